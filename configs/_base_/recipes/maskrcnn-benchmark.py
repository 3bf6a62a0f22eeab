# What maskrcnn-benchmark's recipes have and mmdet's have not: configs take these values over by name.
recipe_model = dict(
    rpn_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9)),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1.0)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
    ),
    train_cfg=dict(rpn=dict(allowed_border=0)),
)
# Whatever is called bias, that of a norm too, has no decay and twice the learning rate; the weights of norms decay.
recipe_optimizer = dict(
    constructor="MergedOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={".bias": dict(lr_mult=2.0, decay_mult=0.0)}),
)
