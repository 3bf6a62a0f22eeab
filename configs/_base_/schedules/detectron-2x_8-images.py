# Detectron's 2x at 8 images: 360k iterations, 24.6 epochs.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=360000, val_interval=30000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=360000, by_epoch=False, milestones=[240000, 320000], gamma=0.1),
]
