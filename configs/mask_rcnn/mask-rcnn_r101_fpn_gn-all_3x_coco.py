# GN in the backbone, FPN, box head and mask head, ResNet-101.
# Published: box/mask AP 42.3/37.2 (GN paper, arXiv 1803.08494, Table 6); box/mask AP 42.1/38.0 (mmdet 3.3.0).
# Recipe: No weight decay on the norms, as in the source.
# Cost: 8 GPUs x 2 images, 36 epochs; Detectron took 87.9 h on 8 P100.
_base_ = [
    "../_base_/mask_rcnn/gn-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/3x.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron/resnet101_gn"))
)
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
