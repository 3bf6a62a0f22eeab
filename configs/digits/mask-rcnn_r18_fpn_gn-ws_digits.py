# GN everywhere behind weight-standardized convolutions.
_base_ = "./mask-rcnn_r18_fpn_bn_digits.py"
norm_cfg = dict(type="GN", num_groups=16, requires_grad=True)
conv_cfg = dict(type="ConvWS")
model = dict(
    backbone=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    neck=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg), mask_head=dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
    ),
)
