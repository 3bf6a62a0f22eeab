# SyncBN in the backbone, ResNet-101, no norm elsewhere, two-layer box head.
# Published: box/mask AP 40.5/36.3 (mmdet 3.3.0, configs/gcnet/metafile.yml; checked).
# Source: mmdet 3.3.0, configs/gcnet/mask-rcnn_r101-syncbn_fpn_1x_coco.py.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    backbone=dict(
        depth=101,
        norm_eval=False,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101"),
    )
)
