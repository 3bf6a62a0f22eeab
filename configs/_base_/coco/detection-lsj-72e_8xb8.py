# 8 GPUs x 8 images of 1024x1024, large scale jitter, 135k iterations: about 73 epochs.
_base_ = ["mmdet::common/lsj-100e_coco-detection.py", "../normplug.py"]
train_dataloader = dict(batch_size=8, sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True))
optim_wrapper = dict(optimizer=dict(lr=0.04))
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=135000, val_interval=15000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.067, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=135000, by_epoch=False, milestones=[120000, 125000], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=15000))
log_processor = dict(by_epoch=False)
