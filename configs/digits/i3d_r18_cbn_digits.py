# CBN: statistics of this batch and the three before, after 8 iterations of plain BN.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(type="CBN", buffer_num=3, burnin=8)))
