# BN* in the backbone, ResNet-101, CBN in FPN, box head and mask head.
# Published: box AP 40.1 (CBN paper, arXiv 2002.05712, COCO test-dev; second-hand, seen in the paper's entry of a public
# leaderboard).
# Source: arXiv 2002.05712; fields of the authors' ResNet-50 file.
# Differs: coordinates continuous (there of whole pixels).
# Recipe: The number is of COCO test-dev, not val2017; what the 35.8 in the same entry's field for small objects is, is
# not known. Gradients are clipped at 35. The burn-in of 8 epochs of plain BN is counted in iterations of 4 x 4 images;
# run as they shipped it, the authors' code burns in for 8 iterations.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = "./mask-rcnn_r50_fpn_cbn-head_4xb4-1x_coco.py"
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")))
