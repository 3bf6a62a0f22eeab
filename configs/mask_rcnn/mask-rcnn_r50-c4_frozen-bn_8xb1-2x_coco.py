# BN*, weight and bias frozen too, in a C4 model: conv5 is the head of the RoIs.
# Published: box/mask AP 37.7/32.8 (GN paper, arXiv 1803.08494, Table 4).
# Recipe: Schedule and warm-up are mmdet's (lr / 10 after 16 and 22 epochs; Detectron after 16 and 21.3).
# Cost: 8 GPUs x 1 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/c4_frozen-bn.py",
    "../_base_/coco/instance_8xb1.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
