# EvoNorm-S0 everywhere, with the groups of GN; it contains the activation; affine only where a block has none.
_base_ = "./mask-rcnn_r18_fpn_bn_digits.py"
norm_cfg = dict(type="EvoNormS0", num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
