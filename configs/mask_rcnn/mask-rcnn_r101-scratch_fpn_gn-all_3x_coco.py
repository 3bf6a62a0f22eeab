# GN in the backbone, FPN, box head and mask head, ResNet-101, from scratch.
# Published: box/mask AP 41.0/36.4 (Detectron, projects/GN/README.md; checked).
# Source: facebookresearch/Detectron, configs/04_2018_gn_baselines/scratch_e2e_mask_rcnn_R-{50,101}-FPN_3x_gn.yaml.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 270k iterations; Detectron took 93.2 h on 8 P100.
_base_ = "./mask-rcnn_r50-scratch_fpn_gn-all_3x_coco.py"
model = dict(backbone=dict(depth=101))
