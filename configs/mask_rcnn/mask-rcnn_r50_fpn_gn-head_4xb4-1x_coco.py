# BN* in the backbone (ImageNet statistics frozen; weight and bias train from stage 2 on); GN in FPN, box head and mask
# head.
# Published: box/mask AP 38.5/35.0 (Howal/Cross-iterationBatchNorm, README; checked).
# Source: Howal/Cross-iterationBatchNorm, configs/cbn/mask_rcnn_r50_fpn_gn_1x.py.
# Differs: coordinates continuous (there of whole pixels).
# Recipe: Gradients are clipped at 35.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-head.py",
    "../_base_/coco/instance_4xb4.py",
    "../_base_/schedules/1x_warmup-third.py",
    "../_base_/recipes/cbn_mask.py",
    "../_base_/coco_runtime.py",
]
model = {{_base_.recipe_model}}
