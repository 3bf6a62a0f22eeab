# I3D ResNet-50 with GN, 4 clips per GPU.
# Published: top-1/top-5 72.8/90.6 (GN paper, arXiv 1803.08494, section 4.3 and Table 8; checked).
# Source: arXiv 1803.08494, section 4.3; what it does not say, from facebookresearch/video-nonlocal-net, the baseline
# that it names.
# Differs: lr 0.005 (there not stated); length 100 epochs (there not stated); lr / 10 after 40, 80 (there not stated);
# input RGB, mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there RGB, mean 114.75 114.75 114.75, std 57.375
# 57.375 57.375); weights detectron-as-rgb://open-mmlab://detectron/resnet50_gn (there the authors' GN ResNet-50); test
# views 10 clips x 3 crops of 256 (there 10 clips).
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = "./i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb.py"
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.005))
auto_scale_lr = dict(base_batch_size=32)
