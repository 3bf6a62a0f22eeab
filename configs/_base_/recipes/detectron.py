# What Detectron's recipes of FPN models have and mmdet's have not: configs take these values over by name.
recipe_model = dict(
    data_preprocessor=dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    rpn_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9)),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1.0)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
    ),
    train_cfg=dict(rpn=dict(allowed_border=0)),
)
# Norms: no decay, the learning rate of weights. Other biases: no decay, twice the learning rate.
recipe_optimizer = dict(
    constructor="MergedOptimWrapperConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0, bias_decay_mult=0.0),
)
