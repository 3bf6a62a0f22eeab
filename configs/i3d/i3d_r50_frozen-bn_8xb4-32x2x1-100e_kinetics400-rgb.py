# I3D ResNet-50 with BN*: ImageNet's statistics, inflated and frozen; weight and bias train.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000).
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = "./i3d_r50_bn_8xb4-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(norm_eval=True))
