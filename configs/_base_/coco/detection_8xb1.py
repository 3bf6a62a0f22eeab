# 8 GPUs x 1 images.
_base_ = "mmdet::_base_/datasets/coco_detection.py"
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0001),
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
