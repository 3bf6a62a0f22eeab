# SyncBN in backbone, FPN and mask head; the two-layer box head has no norm.
# Published: box/mask AP 37.4/34.6 (MMDetection report, arXiv 1906.07155, Table 7; checked).
# Source: arXiv 1906.07155, Tables 6 and 7; fields of mmdet 1's configs/mask_rcnn_r50_fpn_1x.py, read in
# iVMCL/AttentiveNorm_Detection.
# Differs: warm-up 500 iterations from 0.001 (there 500 iterations from 0.333); gradient clipping none (there norm 35);
# proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 an image); sampling ratio 0 (there 2);
# losses of boxes RPN L1, head L1 (there RPN smooth L1 (0.111), head smooth L1 (1)); anchors over the border used (there
# left out); coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg, norm_eval=False),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(mask_head=dict(norm_cfg=norm_cfg)),
)
