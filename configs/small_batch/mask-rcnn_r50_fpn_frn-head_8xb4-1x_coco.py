# BN* in the backbone, FRN with its threshold (TLU) in FPN and heads, 4 images per GPU.
# Published: nothing at this batch size and schedule.
# Recipe: One epoch of warm-up, which FRN needs at any batch.
# Cost: 8 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/frn-head.py",
    "../_base_/coco/instance_8xb4.py",
    "../_base_/schedules/1x_warmup-epoch.py",
    "../_base_/coco_runtime.py",
]
