# BN*: the ImageNet statistics of the backbone's BN are frozen (weight and bias train from stage 2 on), no norm
# elsewhere, two-layer box head. This is mmdet's own baseline.
# Published: box/mask AP 38.2/34.7 (mmdet 3.3.0, metafile.yml; checked).
# Source: mmdet 3.3.0, configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py.
# Cost: 8 GPUs x 2 images, 12 epochs; half of the 44.9 h that Detectron took for 2x on 8 P100.
_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "../_base_/normplug.py"]
