# BN* in the backbone, CBN, a window of four iterations in FPN and heads, 2 images per GPU.
# Published: nothing at this batch size and schedule.
# Recipe: The burn-in is 8 epochs: 8 x 7330 iterations. Unlike the 4xb4 file, gradients are not clipped and the
# warm-up is that of all files of the series.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/cbn-head.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
