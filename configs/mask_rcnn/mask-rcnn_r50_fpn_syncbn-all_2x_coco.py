# SyncBN everywhere, nothing frozen.
# Published: box/mask AP 38.25/34.22 (megvii-model/MABN, README).
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/syncbn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(frozen_stages=-1))
