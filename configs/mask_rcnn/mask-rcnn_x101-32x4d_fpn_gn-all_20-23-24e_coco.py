# GN without weight standardization, x101-32x4d, late decay: the contrast to the gn-ws-all file.
# Published: box/mask AP 36.6/33.4 (mmdet v1, configs/gn+ws/README.md).
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/20-23-24e.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    backbone=dict(
        type="ResNeXt",
        depth=101,
        groups=32,
        base_width=4,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnext101_32x4d_gn"),
    )
)
