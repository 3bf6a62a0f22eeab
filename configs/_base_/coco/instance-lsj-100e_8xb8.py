# 8 GPUs x 8 images of 1024x1024, large scale jitter, 100 epochs, mixed precision: Detectron2's recipe.
_base_ = ["mmdet::common/lsj-100e_coco-instance.py", "../normplug.py"]
train_dataloader = dict(batch_size=8, sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True))
optim_wrapper = dict(
    type="AmpOptimWrapper", constructor="MergedOptimWrapperConstructor", paramwise_cfg=dict(norm_decay_mult=0.0)
)
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=184375, val_interval=7375)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.067, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=184375, by_epoch=False, milestones=[163889, 177546], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=7375))
log_processor = dict(by_epoch=False)
