# GN and standardized convolutions in the backbone, FPN and heads, exactly the authors' batch.
# Published: box/mask AP 40.81/36.51 (joe-siyuan-qiao/maskrcnn-benchmark, README; checked).
# Source: joe-siyuan-qiao/maskrcnn-benchmark, configs/gn_baselines/e2e_mask_rcnn_R_50_FPN_Xconv1fc_2x_gn.yaml.
# Differs: input RGB, mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there BGR, mean 102.98 115.947 122.772, std
# 1); proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU); coordinates
# continuous (there of whole pixels).
# Recipe: The authors feed BGR images that are not divided by a deviation to their own file of the weights; mmdet's copy
# of it takes RGB images with ImageNet's mean and deviation.
# Cost: 4 GPUs x 2 images, 360k iterations.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-all.py",
    "../_base_/coco/instance_4xb2.py",
    "../_base_/schedules/late-2x_8-images.py",
    "../_base_/recipes/maskrcnn-benchmark.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
