# EvoNorm-S0 in FPN, box head and mask head on a BN* backbone. It contains the activation, so the ReLU behind each
# convolution of the heads is gone; FPN's convolutions have none, and there it is only a weight and bias per channel.
# What the paper did in FPN is not known.
# Published: nothing in this recipe. The paper's Mask R-CNN was trained from scratch (64 images per batch, 135k steps);
# our sources for its numbers are unverified. Compare with the frozen-bn-4conv1fc file.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = "./mask-rcnn_r50_fpn_frozen-bn-4conv1fc_1x_coco.py"
norm_cfg = dict(type="EvoNormS0", requires_grad=True)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
