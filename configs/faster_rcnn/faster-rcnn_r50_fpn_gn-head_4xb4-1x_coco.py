# BN* in the backbone, GN in FPN and box head.
# Published: box AP 37.7 (Howal/Cross-iterationBatchNorm, README).
# Recipe: Gradients are clipped at 35, warm-up from a third.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/faster_rcnn/gn-head.py",
    "../_base_/coco/detection_4xb4.py",
    "../_base_/schedules/1x_warmup-third.py",
    "../_base_/coco_runtime.py",
]
