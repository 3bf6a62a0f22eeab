# SyncBN in the backbone, no norm elsewhere, two-layer box head.
# Published: box/mask AP 38.4/34.6 (mmdet 3.3.0, configs/gcnet/metafile.yml; checked); box/mask AP 37.4/34.1
# (MMDetection report, arXiv 1906.07155, Table 7; checked).
# Source: mmdet 3.3.0, configs/gcnet/mask-rcnn_r50-syncbn_fpn_1x_coco.py.
# Differs from MMDetection report, arXiv 1906.07155, Table 7: warm-up 500 iterations from 0.001 (there 500 iterations
# from 0.333); gradient clipping none (there norm 35); proposals 2000 a level, then 1000 an image (there 2000 a level,
# then 2000 an image); sampling ratio 0 (there 2); losses of boxes RPN L1, head L1 (there RPN smooth L1 (0.111), head
# smooth L1 (1)); anchors over the border used (there left out); coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(norm_eval=False, norm_cfg=dict(type="SyncBN", requires_grad=True)))
