# trained BN with standardized convolutions in the backbone too. The checkpoint is still that of a BN network.
_base_ = "./bn-ws-head.py"
model = dict(backbone=dict(norm_cfg={{_base_.norm_cfg}}, conv_cfg={{_base_.conv_cfg}}, norm_eval=False))
