# I3D ResNet-50 with GN, 2 clips per GPU, 64 consecutive frames.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000).
# Cost: 8 GPUs x 2 clips, 100 epochs.
_base_ = ["./i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb.py", "../_base_/kinetics/64x1.py"]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline={{_base_.clips64_train}}))
val_dataloader = dict(dataset=dict(pipeline={{_base_.clips64_val}}))
test_dataloader = dict(dataset=dict(pipeline={{_base_.clips64_test}}))
optim_wrapper = dict(optimizer=dict(lr=0.0025))
auto_scale_lr = dict(base_batch_size=16)
