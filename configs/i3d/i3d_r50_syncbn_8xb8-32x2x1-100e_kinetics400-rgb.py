# I3D ResNet-50 with SyncBN: statistics over the 64 clips of all GPUs. The control is the bn file.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000).
# Cost: 8 GPUs x 8 clips, 100 epochs.
_base_ = "./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(norm_cfg=dict(type="SyncBN", requires_grad=True)))
