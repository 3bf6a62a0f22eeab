# SyncBN everywhere, ResNet-101, two convolutions in the RPN (without norm), from scratch, large scale jitter, mixed
# precision.
# Published: box/mask AP 46.4/41.6 (Detectron2, MODEL_ZOO.md).
# Recipe: Decay of lr after 88 and 96 epochs (Detectron2: 88.9 and 96.3); mmdet's RPN has no norm.
# Cost: 8 GPUs x 8 images, 100 epochs.
_base_ = [
    "../_base_/mask_rcnn/syncbn-scratch.py",
    "../_base_/coco/instance-lsj-100e_8xb8.py",
]
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)]),
    backbone=dict(depth=101),
    rpn_head=dict(num_convs=2),
)
