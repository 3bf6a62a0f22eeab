# GN in the backbone and the box head of four convolutions, none in FPN and mask head.
# Published: box/mask AP 40.0/34.8 (GN paper, arXiv 1803.08494, Table 5).
# Recipe: No weight decay on the norms, as in the source.
# Cost: 8 GPUs x 2 images, 24 epochs; estimate: 51 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of
# GN ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/gn-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
model = dict(neck=dict(norm_cfg=None), roi_head=dict(mask_head=dict(norm_cfg=None)))
