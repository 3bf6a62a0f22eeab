# BN* in the backbone (MSRA's ResNet-50; statistics, weight and bias frozen, as in Detectron); GN in the box head of
# four convolutions alone.
# Published: box AP 39.5 (GN paper, arXiv 1803.08494, section 4.2; checked; at 8 x 1 samples); mask AP 34.4 (GN paper,
# arXiv 1803.08494, Table 5; unverified; at 8 x 1 samples).
# Source: arXiv 1803.08494, section 4.2; what it does not say, from the files that it released.
# Differs: GPUs x samples 8 x 2 (there 8 x 1); lr 0.02 (there not stated); length 180000 iterations (there not stated);
# lr / 10 after 120000, 160000 (there not stated); input BGR, mean 102.98 115.947 122.772, std 1 (there not stated);
# stride in 1x1 (there not stated); proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2
# images of a GPU); coordinates continuous (there of whole pixels); weights open-mmlab://detectron2/resnet50_caffe
# (there the authors' own BN ResNet-50).
# Recipe: The paper trained with 1 image per GPU and its own BN ResNet-50, which it found as good as the one here,
# Detectron's default from MSRA; the number of iterations and lr for 1 image are not stated, so these are the released
# ones for 2.
# Cost: 8 GPUs x 2 images, 180k iterations; estimate: 51 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run
# of GN ResNet-50.
_base_ = "./mask-rcnn_r50_fpn_frozen-bn-4conv1fc_2x_coco.py"
model = dict(roi_head=dict(bbox_head=dict(norm_cfg=dict(type="GN", num_groups=32, requires_grad=True))))
