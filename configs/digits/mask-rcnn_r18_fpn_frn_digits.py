# FRN everywhere, which contains the activation; where a block has none, it normalizes only.
_base_ = "./mask-rcnn_r18_fpn_bn_digits.py"
norm_cfg = dict(type="FRN", eps=1e-6, requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
