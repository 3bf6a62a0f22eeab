# I3D ResNet-50 with EvoNorm-S0 instead of the first two norms and ReLUs of each block; the last norm of a block and
# that of a shortcut are a weight and bias per channel, and the ReLU behind the sum stays. This post-activation layout
# is our own choice: the paper's networks are pre-activation. The control is the gn file.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000); warm-up 1 epoch
# from 0.01 (there none).
# Recipe: From the gn file's 2-D checkpoint (GN's weight and bias, v at its initial 1). One epoch of warm-up, which the
# BN and GN recipes do not have, because the residual sums are not normalized.
# Cost: 8 GPUs x 8 clips, 100 epochs.
_base_ = "./i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(norm_cfg=dict(_delete_=True, type="EvoNormS0", requires_grad=True)))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="MultiStepLR", begin=0, end=100, by_epoch=True, milestones=[40, 80], gamma=0.1),
]
