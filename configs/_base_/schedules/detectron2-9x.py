# Detectron2's 9x: 202.5k iterations of 64 images, warm-up over 1000.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=202500, val_interval=7500)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=202500, by_epoch=False, milestones=[187500, 197500], gamma=0.1),
]
