# From Detectron's GN network: BGR images, not divided by a standard deviation.
_base_ = "./gn-everywhere.py"
model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron/resnet50_gn")),
)
