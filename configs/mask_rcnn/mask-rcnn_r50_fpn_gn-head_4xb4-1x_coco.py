# BN* in the backbone (ImageNet statistics frozen; weight and bias train from stage 2 on); GN in FPN, box head and
# mask head.
# Published: box/mask AP 38.5/35.0 (Howal/Cross-iterationBatchNorm, README).
# Recipe: Gradients are clipped at 35, warm-up from a third.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-head.py",
    "../_base_/coco/instance_4xb4.py",
    "../_base_/schedules/1x_warmup-third.py",
    "../_base_/coco_runtime.py",
]
