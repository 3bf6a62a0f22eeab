# Detectron's 3x: 270k iterations of 16 images, 36.8 epochs.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=270000, val_interval=15000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=270000, by_epoch=False, milestones=[210000, 250000], gamma=0.1),
]
