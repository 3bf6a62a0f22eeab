# Clips of 64 frames, consecutive; short sides jittered in training, as in video-nonlocal-net.
clips64_train = [
    dict(type="DecordInit", io_backend="disk"),
    dict(type="SampleFrames", clip_len=64, frame_interval=1, num_clips=1),
    dict(type="DecordDecode"),
    dict(type="RandomRescale", scale_range=(256, 320)),
    dict(type="RandomCrop", size=224),
    dict(type="Flip", flip_ratio=0.5),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
clips64_val = [
    dict(type="DecordInit", io_backend="disk"),
    dict(type="SampleFrames", clip_len=64, frame_interval=1, num_clips=1, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 256)),
    dict(type="CenterCrop", crop_size=224),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
clips64_test = [
    dict(type="DecordInit", io_backend="disk"),
    dict(type="SampleFrames", clip_len=64, frame_interval=1, num_clips=10, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 256)),
    dict(type="ThreeCrop", crop_size=256),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
