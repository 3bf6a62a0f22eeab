# GN in a C4 model: in the backbone and in conv5, the head of the RoIs.
# Published: box/mask AP 38.8/33.6 (GN paper, arXiv 1803.08494, Table 4).
# Recipe: No weight decay on the norms, as in the source. Schedule and warm-up are mmdet's (lr / 10 after 16 and 22
# epochs; Detectron after 16 and 21.3).
# Cost: 8 GPUs x 1 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/c4_gn.py",
    "../_base_/coco/instance_8xb1.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
