# I3D ResNet-50 with EvoNorm-S0, 4 clips per GPU.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000); warm-up 1 epoch
# from 0.01 (there none).
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = "./i3d_r50_evonorm-s0_8xb8-32x2x1-100e_kinetics400-rgb.py"
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=32)
