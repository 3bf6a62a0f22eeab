# EvoNorm-S0 in the backbone too. The checkpoint is still that of a BN network.
_base_ = "./evonorm-s0-head.py"
model = dict(backbone=dict(norm_cfg={{_base_.norm_cfg}}))
