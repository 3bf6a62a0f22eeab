# FRN, which contains the activation; where a block has none, it normalizes only.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(type="FRN", eps=1e-6)))
