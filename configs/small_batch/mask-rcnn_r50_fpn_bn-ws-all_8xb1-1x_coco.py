# Trained BN and standardized convolutions everywhere, 1 image per GPU.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of mmdet 3.3.0's configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py.
# Recipe: torchvision's weights were trained without standardization. The norm behind a convolution takes the change of
# scale back but not the shift of the filter's mean, so the start is an approximation.
# Cost: 8 GPUs x 1 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/bn-ws-everywhere.py",
    "../_base_/coco/instance_8xb1.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
