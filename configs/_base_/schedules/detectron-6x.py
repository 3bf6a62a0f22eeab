# Detectron's 6x, decay as in its 3x: the last 60k and 20k of 540k iterations of 16 images.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=540000, val_interval=15000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=540000, by_epoch=False, milestones=[480000, 520000], gamma=0.1),
]
