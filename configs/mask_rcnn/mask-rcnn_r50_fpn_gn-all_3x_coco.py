# GN in the backbone, FPN, box head and mask head.
# Published: box/mask AP 40.8/36.1 (GN paper, arXiv 1803.08494, Table 6); box/mask AP 40.5/36.7 (mmdet 3.3.0).
# Recipe: No weight decay on the norms, as in the source.
# Cost: 8 GPUs x 2 images, 36 epochs; Detectron took 77.4 h on 8 P100.
_base_ = [
    "../_base_/mask_rcnn/gn-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/3x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
