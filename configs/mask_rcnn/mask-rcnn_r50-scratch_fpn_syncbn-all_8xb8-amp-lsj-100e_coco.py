# SyncBN everywhere, two convolutions in the RPN, from scratch, large scale jitter, mixed precision.
# Published: box/mask AP 44.6/40.3 (Detectron2, MODEL_ZOO.md; checked).
# Source: facebookresearch/detectron2, configs/new_baselines/mask_rcnn_R_{50,101}_FPN_100ep_LSJ.py.
# Cost: 8 GPUs x 8 images, 184,375 iterations: 100 epochs.
_base_ = [
    "../_base_/mask_rcnn/syncbn-scratch.py",
    "../_base_/coco/instance-lsj-100e_8xb8.py",
]
model = dict(
    data_preprocessor=dict(
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False,
        batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)],
    ),
    backbone=dict(style="caffe"),
    rpn_head=dict(num_convs=2),
)
