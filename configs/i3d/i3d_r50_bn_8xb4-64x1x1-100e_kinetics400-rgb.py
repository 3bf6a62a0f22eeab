# I3D ResNet-50 with BN, 4 clips per GPU, 64 consecutive frames.
# Published: top-1/top-5 73.3/90.8 (GN paper, arXiv 1803.08494, section 4.3 and Table 8; checked).
# Source: arXiv 1803.08494, section 4.3; what it does not say, from facebookresearch/video-nonlocal-net, the baseline
# that it names.
# Differs: lr 0.005 (there not stated); length 100 epochs (there not stated); lr / 10 after 40, 80 (there not stated);
# input RGB, mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there RGB, mean 114.75 114.75 114.75, std 57.375
# 57.375 57.375); weights torchvision://resnet50 (there the authors' own ResNet-50); test views 10 clips x 3 crops of
# 256 (there 10 clips).
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = ["./i3d_r50_bn_8xb8-32x2x1-100e_kinetics400-rgb.py", "../_base_/kinetics/64x1.py"]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline={{_base_.clips64_train}}))
val_dataloader = dict(dataset=dict(pipeline={{_base_.clips64_val}}))
test_dataloader = dict(dataset=dict(pipeline={{_base_.clips64_test}}))
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=32)
