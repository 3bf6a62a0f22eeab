# BN* in the backbone, no norm in FPN and head.
# Published: box AP 36.5 (mmdet 3.3.0, metafile.yml; checked).
# Source: mmdet 3.3.0, configs/retinanet/retinanet_r50_fpn_1x_coco.py.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(optimizer=dict(lr=0.01))
