# C4: conv5 is the head of the RoIs. Backbone and conv5 from the same checkpoint, stride in the 3x3 convolution.
_base_ = "mmdet::_base_/models/faster-rcnn_r50-caffe-c4.py"
norm_cfg = dict(type="BN", requires_grad=False)
init_cfg = dict(type="Pretrained", checkpoint="torchvision://resnet50")
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(style="pytorch", norm_cfg=norm_cfg, init_cfg=init_cfg),
    roi_head=dict(shared_head=dict(style="pytorch", norm_cfg=norm_cfg, init_cfg=init_cfg)),
)
