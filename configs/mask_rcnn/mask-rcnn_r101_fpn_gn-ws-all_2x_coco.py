# GN and standardized convolutions in the backbone, FPN and heads, r101.
# Published: box/mask AP 42.0/37.7 (mmdet 3.3.0, metafile.yml; checked).
# Source: mmdet 3.3.0, configs/gn+ws/mask-rcnn_r101_fpn_gn-ws-all_2x_coco.py.
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnet101_gn_ws")))
