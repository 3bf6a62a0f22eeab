# GN and standardized convolutions in the backbone, FPN and heads, ResNet-101, exactly the authors' batch.
# Published: box/mask AP 42.73/37.92 (joe-siyuan-qiao/maskrcnn-benchmark, README; checked).
# Source: joe-siyuan-qiao/maskrcnn-benchmark, configs/gn_baselines/e2e_mask_rcnn_R_101_FPN_Xconv1fc_2x_gn.yaml.
# Differs: input RGB, mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there BGR, mean 102.98 115.947 122.772, std
# 1); coordinates continuous (there of whole pixels).
# Recipe: The authors feed BGR images that are not divided by a deviation to their own file of the weights; mmdet's copy
# of it takes RGB images with ImageNet's mean and deviation.
# Cost: 4 GPUs x 1 images, 720k iterations.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-all.py",
    "../_base_/coco/instance_4xb1.py",
    "../_base_/schedules/late-2x_4-images.py",
    "../_base_/recipes/maskrcnn-benchmark.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = dict(
    backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnet101_gn_ws")),
    rpn_head={{_base_.recipe_model.rpn_head}},
    roi_head={{_base_.recipe_model.roi_head}},
    train_cfg=dict(rpn=dict(allowed_border=0), rpn_proposal=dict(max_per_img=2000)),
)
optim_wrapper = {{_base_.recipe_optimizer}}
