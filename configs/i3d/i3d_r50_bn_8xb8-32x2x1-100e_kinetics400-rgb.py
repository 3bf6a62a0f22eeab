# I3D ResNet-50 with BN, statistics per GPU (8 clips): mmaction2's model in the recipe of video-nonlocal-net, but for
# its length. All norms of the study train like this: no decay of weight and bias of any norm, jittered short sides, no
# clipping, and running statistics estimated anew before each evaluation.
# Published: top-1/top-5 73.3/90.7 (GN paper, arXiv 1803.08494, section 4.3 and Table 8; checked); top-1/top-5
# 73.47/91.27 (mmaction2 1.2.0, configs/recognition/i3d/metafile.yml; checked); top-1/top-5 73.6/90.8
# (facebookresearch/video-nonlocal-net, README; checked).
# Source: arXiv 1803.08494, section 4.3; what it does not say, from facebookresearch/video-nonlocal-net, the baseline
# that it names.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000); input RGB, mean
# 123.675 116.28 103.53, std 58.395 57.12 57.375 (there RGB, mean 114.75 114.75 114.75, std 57.375 57.375 57.375);
# weights torchvision://resnet50 (there the authors' own ResNet-50); test views 10 clips x 3 crops of 256 (there 10
# clips).
# Differs from mmaction2 1.2.0, configs/recognition/i3d/metafile.yml: momentum 0.9, Nesterov (there 0.9); decay of norms
# 0 (there 0.0001); gradient clipping none (there norm 40); PreciseBN 200 batches (there none); scales short side 256 to
# 320, crops of 224 (there short side 256, crops of 1 and 0.8 of it, at 5 places).
# Differs from facebookresearch/video-nonlocal-net, README: length 100 epochs (there 400000 iterations); lr / 10 after
# 40, 80 (there 150000, 300000); input RGB, mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there RGB, mean 114.75
# 114.75 114.75, std 57.375 57.375 57.375); weights torchvision://resnet50 (there the authors' own ResNet-50).
# Recipe: Runs differ by about 0.3 top-1, and by the videos that are missing from a copy of Kinetics-400.
# Cost: 8 GPUs x 8 clips, 100 epochs of about 240,000 videos.
_base_ = [
    "mmaction::recognition/i3d/i3d_imagenet-pretrained-r50_8xb8-32x2x1-100e_kinetics400-rgb.py",
    "../_base_/kinetics/32x2.py",
    "../_base_/normplug.py",
]
train_dataloader = dict(dataset=dict(pipeline={{_base_.clips32_train}}))
optim_wrapper = dict(
    optimizer=dict(nesterov=True),
    constructor="MergedOptimWrapperConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=None,
)
custom_hooks = [dict(type="PreciseBNHook", num_batches=200)]
