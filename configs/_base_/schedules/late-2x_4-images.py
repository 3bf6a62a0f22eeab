# The late decay of the weight standardization paper: 720k iterations of 4 images.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=720000, val_interval=60000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=720000, by_epoch=False, milestones=[600000, 680000], gamma=0.1),
]
