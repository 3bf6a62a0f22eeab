# Detectron.pytorch, as SwitchNorm_Detection has it: Detectron's recipe, but whatever is called bias, that of a norm
# too, learns at twice the rate. Configs take these values over by name.
recipe_model = dict(
    data_preprocessor=dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    rpn_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9)),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1.0)),
    ),
    train_cfg=dict(rpn=dict(allowed_border=0)),
)
recipe_optimizer = dict(
    constructor="MergedOptimWrapperConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={".bias": dict(lr_mult=2.0, decay_mult=0.0)}),
)
