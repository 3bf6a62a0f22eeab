# Trained BN everywhere, 1 image per GPU.
# Published: nothing at this batch size and schedule.
# Cost: 8 GPUs x 1 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/bn-everywhere.py",
    "../_base_/coco/instance_8xb1.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
