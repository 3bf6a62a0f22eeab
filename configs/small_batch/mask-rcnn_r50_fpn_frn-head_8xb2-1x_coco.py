# BN* in the backbone, FRN with its threshold (TLU) in FPN and heads, 2 images per GPU.
# Published: nothing at this batch size and schedule.
# Cost: 8 GPUs x 2 images, 12 epochs; estimate: 25 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of
# GN ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/frn-head.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
