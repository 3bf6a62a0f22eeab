# BN* as in the 1x file, for 24 epochs.
# Published: box/mask AP 39.2/35.4 (mmdet 3.3.0); 38.6/34.5 (Detectron, projects/GN/README.md).
# Cost: 8 GPUs x 2 images; Detectron took 44.9 h on 8 P100.
_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py", "../_base_/normplug.py"]
