# From scratch: nothing is loaded, nothing is frozen.
_base_ = "./gn-ws-everywhere.py"
model = dict(backbone=dict(frozen_stages=-1, zero_init_residual=False, init_cfg=None))
