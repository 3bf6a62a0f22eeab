# BN* in the backbone, no norm elsewhere, two-layer box head.
# Published: box AP 38.4 (mmdet 3.3.0); box AP 37.9 (Detectron, MODEL_ZOO.md).
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "mmdet::_base_/models/faster-rcnn_r50_fpn.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
