# GN and standardized convolutions in the backbone, FPN and heads, from scratch.
# Published: nothing in this recipe.
# Cost: 8 GPUs x 2 images, 73 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/6x.py",
    "../_base_/coco_runtime.py",
]
