# GN, 8 groups: two channels in each of the narrowest layer, as in the ResNet-50 of the paper.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(type="GN", num_groups=8)))
