# Clips of 64 consecutive frames; else as mmaction2's I3D.
clips_train = [
    dict(type="DecordInit", io_backend="disk"),
    dict(type="SampleFrames", clip_len=64, frame_interval=1, num_clips=1),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 256)),
    dict(type="MultiScaleCrop", input_size=224, scales=(1, 0.8), random_crop=False, max_wh_scale_gap=0),
    dict(type="Resize", scale=(224, 224), keep_ratio=False),
    dict(type="Flip", flip_ratio=0.5),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
clips_val = [
    dict(type="DecordInit", io_backend="disk"),
    dict(type="SampleFrames", clip_len=64, frame_interval=1, num_clips=1, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 256)),
    dict(type="CenterCrop", crop_size=224),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
clips_test = [
    dict(type="DecordInit", io_backend="disk"),
    dict(type="SampleFrames", clip_len=64, frame_interval=1, num_clips=10, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 256)),
    dict(type="ThreeCrop", crop_size=256),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
