# BN over the clips of all processes; in one process it is BN.
_base_ = "./i3d_r18_bn_digits.py"
model = dict(backbone=dict(norm_cfg=dict(type="SyncBN")))
