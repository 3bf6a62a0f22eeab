# BN* in the backbone (ImageNet statistics frozen; weight and bias train from stage 2 on), ResNet-101, no norm
# elsewhere, two-layer box head.
# Published: box/mask AP 40.0/36.1 (mmdet 3.3.0, metafile.yml; checked).
# Source: mmdet 3.3.0, configs/mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py.
# Cost: 8 GPUs x 2 images, 12 epochs; estimate: 25 h on 8 P100, in proportion to the 49.7 h of Detectron's 2x run of BN*
# ResNet-101.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")))
