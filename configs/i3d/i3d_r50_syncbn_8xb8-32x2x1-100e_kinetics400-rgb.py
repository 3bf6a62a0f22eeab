# I3D ResNet-50 with SyncBN: statistics over the 64 clips of all GPUs.
# Published: nothing for this recipe; the control is the bn file.
# Cost: 8 GPUs x 8 clips of 32 frames, 100 epochs.
_base_ = "./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(norm_cfg=dict(type="SyncBN", requires_grad=True)))
