# GN in backbone, FPN and mask head; the two-layer box head has no norm.
# Published: box/mask AP 37.4/34.5 (MMDetection report, arXiv 1906.07155, Table 7; checked).
# Source: arXiv 1906.07155, Tables 6 and 7; fields of mmdet 1's configs/mask_rcnn_r50_fpn_1x.py, read in
# iVMCL/AttentiveNorm_Detection.
# Differs: warm-up 500 iterations from 0.001 (there 500 iterations from 0.333); gradient clipping none (there norm 35);
# proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 an image); sampling ratio 0 (there 2);
# losses of boxes RPN L1, head L1 (there RPN smooth L1 (0.111), head smooth L1 (1)); anchors over the border used (there
# left out); coordinates continuous (there of whole pixels).
# Recipe: Norms are decayed by 1e-4, as mmdet does it; the GN paper does not decay them.
# Cost: 8 GPUs x 2 images, 12 epochs; estimate: 25 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of GN
# ResNet-50.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg, init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron/resnet50_gn")),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(mask_head=dict(norm_cfg=norm_cfg)),
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
)
