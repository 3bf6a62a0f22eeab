# I3D ResNet-50 with GN over 32 groups of channels in the whole backbone.
# Published: top-1/top-5 73.0/90.6 (GN paper, arXiv 1803.08494, section 4.3 and Table 8; checked).
# Source: arXiv 1803.08494, section 4.3; what it does not say, from facebookresearch/video-nonlocal-net, the baseline
# that it names.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000); input RGB, mean
# 123.675 116.28 103.53, std 58.395 57.12 57.375 (there RGB, mean 114.75 114.75 114.75, std 57.375 57.375 57.375);
# weights detectron-as-rgb://open-mmlab://detectron/resnet50_gn (there the authors' GN ResNet-50); test views 10 clips x
# 3 crops of 256 (there 10 clips).
# Recipe: From an ImageNet GN ResNet-50 inflated in time. The checkpoint expects BGR images that are not divided by a
# standard deviation; detectron-as-rgb:// rewrites its first convolution for the RGB clips of the data_preprocessor.
# Cost: 8 GPUs x 8 clips, 100 epochs.
_base_ = "./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(
    backbone=dict(
        norm_cfg=dict(type="GN", num_groups=32, requires_grad=True),
        pretrained="detectron-as-rgb://open-mmlab://detectron/resnet50_gn",
    )
)
