# GN and standardized convolutions in the backbone, FPN and heads, r101, late decay.
# Published: box/mask AP 43.1/38.6 (mmdet 3.3.0); box/mask AP 42.73/37.92 (joe-siyuan-qiao/maskrcnn-benchmark,
# README).
# Recipe: The authors trained with 8 or 4 images per iteration.
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/20-23-24e.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnet101_gn_ws")))
