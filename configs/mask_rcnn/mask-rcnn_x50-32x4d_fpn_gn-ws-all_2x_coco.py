# GN and standardized convolutions in the backbone, FPN and heads, x50-32x4d.
# Published: box/mask AP 41.1/37.0 (mmdet 3.3.0, metafile.yml; checked).
# Source: mmdet 3.3.0, configs/gn+ws/mask-rcnn_x50-32x4d_fpn_gn-ws-all_2x_coco.py.
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    backbone=dict(
        type="ResNeXt",
        groups=32,
        base_width=4,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnext50_32x4d_gn_ws"),
    )
)
