# BN trained everywhere with the statistics of 2 images, from scratch.
# Published: box/mask AP 32.38/29.07 (megvii-model/MABN, README).
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/bn-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
