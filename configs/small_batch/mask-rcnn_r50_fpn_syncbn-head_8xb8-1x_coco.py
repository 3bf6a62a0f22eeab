# BN* in the backbone, SyncBN in FPN and heads, 8 images per GPU.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of mmdet 3.3.0's configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py.
# Cost: 8 GPUs x 8 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/syncbn-head.py",
    "../_base_/coco/instance_8xb8.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
