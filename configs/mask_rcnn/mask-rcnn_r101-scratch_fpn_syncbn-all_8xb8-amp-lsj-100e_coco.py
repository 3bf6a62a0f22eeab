# SyncBN everywhere, ResNet-101, two convolutions in the RPN, from scratch, large scale jitter, mixed precision.
# Published: box/mask AP 46.4/41.6 (Detectron2, MODEL_ZOO.md; checked).
# Source: facebookresearch/detectron2, configs/new_baselines/mask_rcnn_R_{50,101}_FPN_100ep_LSJ.py.
# Cost: 8 GPUs x 8 images, 184,375 iterations: 100 epochs.
_base_ = "./mask-rcnn_r50-scratch_fpn_syncbn-all_8xb8-amp-lsj-100e_coco.py"
model = dict(backbone=dict(depth=101))
