# EvoNorm-S0 with the groups of GN; it contains the activation; affine only where a block has none.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(type="EvoNormS0", num_groups=8)))
