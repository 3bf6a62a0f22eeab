# C4: conv5 is the head of the RoIs. Backbone and conv5 from the same checkpoint, stride in the 3x3 convolution.
_base_ = "mmdet::_base_/models/mask-rcnn_r50-caffe-c4.py"
norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
init_cfg = dict(type="Pretrained", checkpoint="open-mmlab://detectron/resnet50_gn")
model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(style="pytorch", norm_cfg=norm_cfg, init_cfg=init_cfg),
    roi_head=dict(shared_head=dict(style="pytorch", norm_cfg=norm_cfg, init_cfg=init_cfg)),
)
