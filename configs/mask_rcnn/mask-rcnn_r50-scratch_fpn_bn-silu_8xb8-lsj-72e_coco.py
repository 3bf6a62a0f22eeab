# Trained BN everywhere, with SiLU in the place of every ReLU behind a norm or a residual sum, from scratch, large scale
# jitter.
# Published: the EvoNorm paper has a value that we could not recover.
# Source: arXiv 2004.02967, recalled, not read.
# Recipe: The source does not say which images BN's statistics come from: here the 8 of one GPU. Layers without a norm
# (RPN, fully connected ones, the mask head's transposed convolution) keep ReLU.
# Cost: 8 GPUs x 8 images, 73 epochs.
_base_ = "./mask-rcnn_r50-scratch_fpn_bn-relu_8xb8-lsj-72e_coco.py"
norm_cfg = dict(type="BNAct", act="silu")
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
