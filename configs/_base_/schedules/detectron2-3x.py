# Detectron2's 3x: 270k iterations of 16 images, warm-up over 1000.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=270000, val_interval=15000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=270000, by_epoch=False, milestones=[210000, 250000], gamma=0.1),
]
