# GN in FPN and head; backbone BN*.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
model = dict(neck=dict(norm_cfg=norm_cfg), bbox_head=dict(norm_cfg=norm_cfg))
