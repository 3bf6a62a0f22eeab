# GN in the backbone, FPN, box head and mask head, ResNet-101.
# Published: box/mask AP 41.8/36.8 (GN paper, arXiv 1803.08494, Table 6); box/mask AP 41.9/37.6 (mmdet 3.3.0).
# Recipe: No weight decay on the norms, as in the source.
# Cost: 8 GPUs x 2 images, 24 epochs; Detectron took 57.5 h on 8 P100.
_base_ = [
    "../_base_/mask_rcnn/gn-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron/resnet101_gn"))
)
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
