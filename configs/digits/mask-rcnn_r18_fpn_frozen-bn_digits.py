# Frozen BN, the papers' baseline: fine-tune what BN learnt at a large batch, its norms as constants.
# Start it from such a checkpoint, --cfg-options load_from=FILE: from nothing it has no normalization at all.
_base_ = "./mask-rcnn_r18_fpn_bn_digits.py"
norm_cfg = dict(type="FrozenBatchNorm", requires_grad=False)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
