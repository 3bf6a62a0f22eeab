# 202.5k iterations of 64 images, lr / 10 after 187.5k and 197.5k.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=110, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=110, by_epoch=True, milestones=[102, 108], gamma=0.1),
]
