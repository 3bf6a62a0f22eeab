# SyncBN everywhere, 2 images per GPU.
# Published: box/mask AP 38.9/35.2 (MMDetection report, arXiv 1906.07155, Table 7).
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/syncbn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
