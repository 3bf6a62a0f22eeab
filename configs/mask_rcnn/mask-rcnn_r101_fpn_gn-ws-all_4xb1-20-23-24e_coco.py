# GN and standardized convolutions in the backbone, FPN and heads, ResNet-101, exactly the authors' batch.
# Published: box/mask AP 42.73/37.92 (joe-siyuan-qiao/maskrcnn-benchmark, README).
# Cost: 4 GPUs x 1 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-all.py",
    "../_base_/coco/instance_4xb1.py",
    "../_base_/schedules/20-23-24e.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnet101_gn_ws")))
