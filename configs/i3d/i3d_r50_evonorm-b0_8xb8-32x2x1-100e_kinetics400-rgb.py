# I3D ResNet-50 with EvoNorm-B0, laid out as in the evonorm-s0 file: post-activation, our own choice.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000); warm-up 1 epoch
# from 0.01 (there none).
# Recipe: One epoch of warm-up, which the BN recipe does not have.
# Cost: 8 GPUs x 8 clips, 100 epochs.
_base_ = "./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(norm_cfg=dict(type="EvoNormB0", requires_grad=True)))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="MultiStepLR", begin=0, end=100, by_epoch=True, milestones=[40, 80], gamma=0.1),
]
