# GN in the backbone, FPN, box head and mask head, ResNet-101, from scratch.
# Published: box/mask AP 41.0/36.4 (GN paper, arXiv 1803.08494, Table 7).
# Recipe: No weight decay on the norms, as in the source. Images are RGB with ImageNet's mean and deviation, as in
# mmdet's scratch configs.
# Cost: 8 GPUs x 2 images, 36 epochs; Detectron took 93.2 h on 8 P100.
_base_ = [
    "../_base_/mask_rcnn/gn-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/3x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
