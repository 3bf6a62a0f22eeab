# GN in the backbone, FPN, box head and mask head, ResNet-101, from scratch.
# Published: box/mask AP 42.7/37.6 (Rethinking ImageNet Pre-training, arXiv 1811.08883, Table 2; checked).
# Source: arXiv 1811.08883, section 4; what it leaves to Detectron, from Detectron's scratch_e2e files.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 540k iterations; estimate: 186 h on 8 P100, in proportion to the 93.2 h of Detectron's 3x
# run.
_base_ = "./mask-rcnn_r50-scratch_fpn_gn-all_6x_coco.py"
model = dict(backbone=dict(depth=101))
