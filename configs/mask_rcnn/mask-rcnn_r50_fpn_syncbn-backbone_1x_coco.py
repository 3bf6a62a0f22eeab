# SyncBN in the backbone, no norm elsewhere, two-layer box head.
# Published: box/mask AP 38.4/34.6 (mmdet 3.3.0, configs/gcnet); box/mask AP 37.4/34.1 (MMDetection report, arXiv
# 1906.07155, Table 7).
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(norm_eval=False, norm_cfg=dict(type="SyncBN", requires_grad=True)))
