# BN* in the backbone, no norm in FPN and box head.
# Published: box AP 36.8 (Howal/Cross-iterationBatchNorm, README; checked).
# Source: Howal/Cross-iterationBatchNorm, configs/cbn/faster_rcnn_r50_fpn_1x.py.
# Differs: coordinates continuous (there of whole pixels).
# Recipe: Gradients are clipped at 35.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/faster_rcnn/4conv1fc.py",
    "../_base_/coco/detection_4xb4.py",
    "../_base_/schedules/1x_warmup-third.py",
    "../_base_/recipes/cbn_faster.py",
    "../_base_/coco_runtime.py",
]
model = {{_base_.recipe_model}}
