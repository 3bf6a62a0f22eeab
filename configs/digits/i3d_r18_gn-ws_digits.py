# GN behind weight-standardized 3-D convolutions.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(conv_cfg=dict(type="ConvWS3d"), norm_cfg=dict(type="GN", num_groups=8)))
