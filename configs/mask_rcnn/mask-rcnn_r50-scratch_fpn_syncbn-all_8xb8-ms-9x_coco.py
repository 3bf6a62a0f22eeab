# SyncBN everywhere, from scratch, multi-scale training.
# Published: box/mask AP 43.6/39.3 (Detectron2, MODEL_ZOO.md).
# Cost: 8 GPUs x 8 images, 110 epochs.
_base_ = [
    "../_base_/mask_rcnn/syncbn-scratch.py",
    "../_base_/coco/instance-ms_8xb8.py",
    "../_base_/schedules/9x.py",
    "../_base_/coco_runtime.py",
]
