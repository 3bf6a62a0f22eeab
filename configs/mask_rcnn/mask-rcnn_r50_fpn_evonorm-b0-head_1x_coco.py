# BN* in the backbone; EvoNorm-B0 in FPN, box head and mask head.
# Published: nothing in this recipe.
# Recipe: FPN's convolutions have no activation, so there the layer has none.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/evonorm-b0-head.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
