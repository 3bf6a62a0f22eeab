# BN* in the backbone, CBN, a window of four iterations in FPN and heads, 8 images per GPU.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of mmdet 3.3.0's configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py.
# Recipe: The burn-in is 8 epochs: 8 x 1833 iterations.
# Cost: 8 GPUs x 8 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/cbn-head.py",
    "../_base_/coco/instance_8xb8.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
norm_cfg = dict(burnin=14664)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
