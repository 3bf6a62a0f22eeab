# I3D ResNet-50 with GN over 32 groups of channels in the whole backbone, no weight decay on the norms.
# Published: top-1/top-5 73.0/90.6 (arXiv 1803.08494, Table 8), from an ImageNet GN ResNet-50 inflated in time.
# The schedule is that of mmaction2's I3D, not the paper's (400k iterations, Nesterov, no gradient clipping); with BN
# the two give the same accuracy to within 0.3.
# The checkpoint expects BGR images that are not divided by a standard deviation; detectron-as-rgb:// rewrites its
# first convolution for the RGB clips of the data_preprocessor.
# Cost: 8 GPUs x 8 clips of 32 frames, 100 epochs.
_base_ = "./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(
    backbone=dict(
        norm_cfg=dict(type="GN", num_groups=32, requires_grad=True),
        pretrained="detectron-as-rgb://open-mmlab://detectron/resnet50_gn",
    )
)
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
