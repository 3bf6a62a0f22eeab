# BN* in the backbone; FRN with its threshold (TLU) in FPN, box head and mask head.
# Published: nothing in this recipe.
# Recipe: One epoch of warm-up, which FRN needs at any batch. FPN's convolutions have no activation, so there the layer
# has none.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/frn-head.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x_warmup-epoch.py",
    "../_base_/coco_runtime.py",
]
