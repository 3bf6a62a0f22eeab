# GN in the backbone, FPN, box head and mask head, from scratch.
# Published: box/mask AP 41.3/36.6 (Rethinking ImageNet Pre-training, arXiv 1811.08883, Table 2); box/mask AP
# 41.2/37.4 (mmdet 3.3.0).
# Recipe: No weight decay on the norms, as in the source. Images are RGB with ImageNet's mean and deviation, as in
# mmdet's scratch configs.
# Cost: 8 GPUs x 2 images, 73 epochs; estimate: 155 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of
# GN ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/gn-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/6x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
