# GN in the backbone, FPN, box head and mask head, ResNet-101, from scratch.
# Published: box/mask AP 42.7/37.6 (Rethinking ImageNet Pre-training, arXiv 1811.08883, Table 2).
# Recipe: No weight decay on the norms, as in the source. Images are RGB with ImageNet's mean and deviation, as in
# mmdet's scratch configs.
# Cost: 8 GPUs x 2 images, 73 epochs; estimate: 175 h on 8 P100, in proportion to the 57.5 h of Detectron's 2x run of
# GN ResNet-101.
_base_ = [
    "../_base_/mask_rcnn/gn-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/6x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
