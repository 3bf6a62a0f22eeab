# CBN in the backbone, FPN and box head.
# Published: box AP 37.7 (CBN paper, arXiv 2002.05712; unverified).
# Source: arXiv 2002.05712; fields of the authors' file for CBN in FPN and head.
# Differs: coordinates continuous (there of whole pixels).
# Recipe: Gradients are clipped at 35. The burn-in of 8 epochs of plain BN is counted in iterations of 4 x 4 images; run
# as they shipped it, the authors' code burns in for 8 iterations.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/faster_rcnn/cbn-everywhere.py",
    "../_base_/coco/detection_4xb4.py",
    "../_base_/schedules/1x_warmup-third.py",
    "../_base_/recipes/cbn_faster.py",
    "../_base_/coco_runtime.py",
]
model = {{_base_.recipe_model}}
