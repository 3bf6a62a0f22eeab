# I3D ResNet-50 with CBN in the whole backbone, a window of four iterations.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000).
# Recipe: The burn-in of 8 epochs is that of the detection recipe, counted in iterations of 240,436 videos: our own
# choice.
# Cost: 8 GPUs x 8 clips, 100 epochs.
_base_ = "./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(norm_cfg=dict(type="CBN", buffer_num=3, burnin=30056, requires_grad=True)))
