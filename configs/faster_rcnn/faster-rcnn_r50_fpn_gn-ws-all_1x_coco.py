# GN and standardized convolutions in the backbone, FPN and heads, r50.
# Published: box AP 39.7 (mmdet 3.3.0); box AP 39.36 (joe-siyuan-qiao/maskrcnn-benchmark, README).
# Recipe: The authors trained with 8 or 4 images per iteration.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/faster_rcnn/gn-ws-all.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
