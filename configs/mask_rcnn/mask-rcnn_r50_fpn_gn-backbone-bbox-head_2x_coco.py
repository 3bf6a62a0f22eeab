# GN in the backbone and the box head of four convolutions, none in FPN and mask head.
# Published: box AP 40.0 (GN paper, arXiv 1803.08494, section 4.2; checked; at 8 x 1 samples); mask AP 34.8 (GN paper,
# arXiv 1803.08494, Table 5; unverified; at 8 x 1 samples).
# Source: arXiv 1803.08494, section 4.2; what it does not say, from the files that it released.
# Differs: GPUs x samples 8 x 2 (there 8 x 1); lr 0.02 (there not stated); length 180000 iterations (there not stated);
# lr / 10 after 120000, 160000 (there not stated); proposals 2000 a level, then 1000 an image (there 2000 a level, then
# 2000 for the 2 images of a GPU); coordinates continuous (there of whole pixels).
# Recipe: The paper trained with 1 image per GPU; the number of iterations and lr for 1 image are not stated, so these
# are the released ones for 2.
# Cost: 8 GPUs x 2 images, 180k iterations; estimate: 51 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run
# of GN ResNet-50.
_base_ = "./mask-rcnn_r50_fpn_gn-all_2x_coco.py"
model = dict(neck=dict(norm_cfg=None), roi_head=dict(mask_head=dict(norm_cfg=None)))
