# FRN with its threshold (TLU) everywhere, from scratch: nothing is loaded, nothing is frozen.
_base_ = "./frn-head.py"
model = dict(backbone=dict(norm_cfg={{_base_.norm_cfg}}, frozen_stages=-1, zero_init_residual=False, init_cfg=None))
