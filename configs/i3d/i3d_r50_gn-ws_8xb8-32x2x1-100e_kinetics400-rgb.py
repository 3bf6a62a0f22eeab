# I3D ResNet-50 with GN and standardized 3-D convolutions (mean and deviation over input channels, time and space). The
# control is the gn file.
# Published: nothing in this recipe.
# Source: our own study, in the recipe of video-nonlocal-net.
# Differs: length 100 epochs (there 400000 iterations); lr / 10 after 40, 80 (there 150000, 300000).
# Recipe: The 2-D weights are those of the authors of WS, trained with GN+WS on RGB images.
# Cost: 8 GPUs x 8 clips, 100 epochs.
_base_ = "./i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(conv_cfg=dict(type="ConvWS3d"), pretrained="open-mmlab://jhu/resnet50_gn_ws"))
