# FRN with its threshold (TLU) in FPN and head; backbone BN*.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
norm_cfg = dict(type="FRN", eps=1e-6, requires_grad=True)
model = dict(neck=dict(norm_cfg=norm_cfg), bbox_head=dict(norm_cfg=norm_cfg))
