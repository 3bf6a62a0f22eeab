# BN trained in the backbone with the statistics of 2 images, no norm elsewhere, two-layer box head.
# Published: box/mask AP 34.2/31.2 (MMDetection report, arXiv 1906.07155, Table 6).
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(norm_eval=False))
