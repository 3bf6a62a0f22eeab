# BN* in the backbone, GN with standardized convolutions in FPN and heads, 2 images per GPU.
# Published: nothing at this batch size and schedule.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-head.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
