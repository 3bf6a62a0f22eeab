# BN trained everywhere with the statistics of 2 images.
# Published: nothing in this recipe.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/bn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
