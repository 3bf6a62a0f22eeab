# I3D ResNet-50 with BN, statistics per GPU (8 clips): mmaction2's own config.
# Published: top-1/top-5 73.3/90.7 (GN paper, arXiv 1803.08494, Table 8); 73.47/91.27 (mmaction2 1.2.0). Runs differ by
# about 0.3 top-1, and by the videos that are missing from a copy of Kinetics-400.
# Cost: 8 GPUs x 8 clips of 32 frames, 100 epochs of about 240,000 videos.
_base_ = [
    "mmaction::recognition/i3d/i3d_imagenet-pretrained-r50_8xb8-32x2x1-100e_kinetics400-rgb.py",
    "../_base_/normplug.py",
]
