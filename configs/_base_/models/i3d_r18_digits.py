# I3D for clips of 8 frames of 64x64, from scratch: a ResNet3d-18 cut to 16 channels, three stages and one block each.
# The whole of it, or the head's usual init_std of 0.01, leaves the first plateau of the loss only after many more
# iterations than the quick run has.
norm_cfg = dict(type="BN3d", requires_grad=True)
model = dict(
    type="Recognizer3D",
    backbone=dict(
        type="ResNet3d",
        depth=18,
        base_channels=16,
        pretrained=None,
        pretrained2d=False,
        num_stages=3,
        stage_blocks=(1, 1, 1),
        out_indices=(2,),
        spatial_strides=(1, 2, 2),
        temporal_strides=(1, 1, 1),
        dilations=(1, 1, 1),
        inflate=(1, 1, 1),
        conv1_kernel=(3, 7, 7),
        with_pool2=False,
        conv_cfg=dict(type="Conv3d"),
        norm_cfg=norm_cfg,
        norm_eval=False,
        frozen_stages=-1,
        zero_init_residual=False,
    ),
    cls_head=dict(
        type="I3DHead",
        num_classes=8,
        in_channels=64,
        spatial_type="avg",
        dropout_ratio=0.0,
        init_std=0.1,
        average_clips="prob",
    ),
    data_preprocessor=dict(
        type="ActionDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        format_shape="NCTHW",
    ),
)
