# I3D ResNet-50 with GN and standardized 3-D convolutions (mean and deviation over input channels, time and space).
# Published: nothing for this recipe; the control is the gn file. The 2-D weights are the authors', trained with GN+WS
# on RGB images.
# Cost: 8 GPUs x 8 clips of 32 frames, 100 epochs.
_base_ = "./i3d_r50_gn_8xb8-32x2x1-100e_kinetics400-rgb.py"
model = dict(backbone=dict(conv_cfg=dict(type="ConvWS3d"), pretrained="open-mmlab://jhu/resnet50_gn_ws"))
