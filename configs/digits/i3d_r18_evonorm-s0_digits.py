# EvoNorm-S0, which contains the activation; affine only where a block has none.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(type="EvoNormS0")))
