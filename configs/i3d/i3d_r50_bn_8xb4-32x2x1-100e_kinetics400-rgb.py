# I3D ResNet-50 with BN, statistics per GPU.
# Published: top-1/top-5 72.1/90.0 (GN paper, arXiv 1803.08494, Table 8).
# Recipe: The schedule is mmaction2's, not the paper's 400k iterations.
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = "./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=32)
