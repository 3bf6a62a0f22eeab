# BN* in the backbone, ResNet-101, CBN in FPN, box head and mask head.
# Published: box/mask AP 40.1/35.8 (public leaderboard entry of the CBN paper; meaning of the mask value
# unconfirmed).
# Recipe: Gradients are clipped at 35, warm-up from a third. The burn-in of 8 epochs of plain BN is counted in
# iterations of 4 x 4 images; run as they shipped it, the authors' code burns in for 8 iterations.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/cbn-head.py",
    "../_base_/coco/instance_4xb4.py",
    "../_base_/schedules/1x_warmup-third.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")))
