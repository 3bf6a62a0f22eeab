# 4 GPUs x 4 images; gradients are clipped, as in the recipe of CBN.
_base_ = "mmdet::_base_/datasets/coco_detection.py"
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=0.0001),
    clip_grad=dict(max_norm=35, norm_type=2),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
