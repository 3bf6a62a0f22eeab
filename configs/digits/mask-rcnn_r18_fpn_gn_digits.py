# GN everywhere, 16 groups: two channels in each of the narrowest layer, as in the ResNet-50 of the paper.
_base_ = "./mask-rcnn_r18_fpn_bn_digits.py"
norm_cfg = dict(type="GN", num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
