# The late decay of the weight standardization paper: 360k iterations of 8 images.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=360000, val_interval=30000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=360000, by_epoch=False, milestones=[300000, 340000], gamma=0.1),
]
