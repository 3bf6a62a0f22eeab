# BN* in the backbone, FRN with its threshold (TLU) in FPN and heads, 8 images per GPU.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of mmdet 3.3.0's configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py.
# Differs: warm-up 1 epoch from 0.001 (there 500 iterations from 0.001).
# Recipe: One epoch of warm-up, which FRN needs at any batch. FPN's convolutions have no activation, so there the layer
# has none.
# Cost: 8 GPUs x 8 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/frn-head.py",
    "../_base_/coco/instance_8xb8.py",
    "../_base_/schedules/1x_warmup-epoch.py",
    "../_base_/coco_runtime.py",
]
