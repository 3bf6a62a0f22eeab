# I3D ResNet-50 with EvoNorm-S0, laid out and started as the 8xb8 file says.
# Published: nothing in this recipe.
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = "./i3d_r50_evonorm-s0_8xb8-32x2x1-100e_kinetics400-rgb.py"
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=32)
