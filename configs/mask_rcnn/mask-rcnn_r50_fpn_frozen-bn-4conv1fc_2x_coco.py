# BN* in the backbone (ImageNet statistics frozen; weight and bias train from stage 2 on), no norm elsewhere, box
# head of four convolutions: the control for normalized heads.
# Published: box/mask AP 38.6/34.2 (GN paper, arXiv 1803.08494, Table 5); box/mask AP 38.8/34.4 (Detectron,
# projects/GN/README.md).
# Cost: 8 GPUs x 2 images, 24 epochs; estimate: 45 h on 8 P100, in proportion to the 44.9 h of Detectron's 2x run of
# BN* ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/4conv1fc.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
