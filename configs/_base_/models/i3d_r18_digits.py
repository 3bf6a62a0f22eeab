# I3D with a ResNet3d-18 of 16 channels for clips of 8 frames of 64x64, from scratch.
norm_cfg = dict(type="BN3d", requires_grad=True)
model = dict(
    type="Recognizer3D",
    backbone=dict(
        type="ResNet3d",
        depth=18,
        base_channels=16,
        pretrained=None,
        pretrained2d=False,
        conv1_kernel=(3, 7, 7),
        with_pool2=False,
        inflate=(1, 1, 1, 1),
        conv_cfg=dict(type="Conv3d"),
        norm_cfg=norm_cfg,
        norm_eval=False,
        frozen_stages=-1,
        zero_init_residual=False,
    ),
    cls_head=dict(
        type="I3DHead",
        num_classes=8,
        in_channels=128,
        spatial_type="avg",
        dropout_ratio=0.0,  # the run ends long before it overfits
        init_std=0.01,
        average_clips="prob",
    ),
    data_preprocessor=dict(
        type="ActionDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        format_shape="NCTHW",
    ),
)
