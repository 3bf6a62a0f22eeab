# BN* in the backbone, GN in FPN and head.
# Published: nothing in this recipe.
# Source: our own experiment, in the recipe of mmdet 3.3.0's configs/retinanet/retinanet_r50_fpn_1x_coco.py.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/retinanet/gn-head.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(optimizer=dict(lr=0.01))
