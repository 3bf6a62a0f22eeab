# From the authors' network with GN and standardized convolutions, RGB.
_base_ = "./gn-ws-everywhere.py"
model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnet50_gn_ws")))
