# BN* in the backbone (ImageNet statistics frozen; weight and bias train from stage 2 on), ResNet-101, no norm
# elsewhere, two-layer box head.
# Published: box/mask AP 40.8/36.6 (mmdet 3.3.0); box/mask AP 40.9/36.4 (Detectron, projects/GN/README.md).
# Cost: 8 GPUs x 2 images, 24 epochs; Detectron took 49.7 h on 8 P100.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")))
