# BN* in the backbone, CBN, a window of four iterations in FPN and heads, 4 images per GPU.
# Published: nothing at this batch size and schedule.
# Recipe: The burn-in is 8 epochs: 8 x 3665 iterations. Unlike the 4xb4 file, gradients are not clipped and the
# warm-up is that of all files of the series.
# Cost: 8 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/cbn-head.py",
    "../_base_/coco/instance_8xb4.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
norm_cfg = dict(burnin=29320)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
