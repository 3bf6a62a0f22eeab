# CBN, a window of four iterations in the backbone too. The checkpoint is still that of a BN network.
_base_ = "./cbn-head.py"
model = dict(backbone=dict(norm_cfg={{_base_.norm_cfg}}, norm_eval=False))
