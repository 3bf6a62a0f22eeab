# SyncBN everywhere, 2 images per GPU.
# Published: box/mask AP 38.9/35.2 (MMDetection report, arXiv 1906.07155, Table 7).
# Cost: 8 GPUs x 2 images, 12 epochs; estimate: 25 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of
# GN ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/syncbn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
