# BN* in the backbone, EvoNorm-B0 in FPN and heads, 1 image per GPU.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of mmdet 3.3.0's configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py.
# Recipe: FPN's convolutions have no activation, so there the layer has none.
# Cost: 8 GPUs x 1 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/evonorm-b0-head.py",
    "../_base_/coco/instance_8xb1.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
