# GN, 8 groups: the narrowest layer has 16 channels.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(type="GN", num_groups=8)))
