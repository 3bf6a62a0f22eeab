# I3D ResNet-50 with BN*: ImageNet's statistics, inflated and frozen; weight and bias train.
# Published: nothing in this recipe.
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = "./i3d_r50_bn_8xb4-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(norm_eval=True))
