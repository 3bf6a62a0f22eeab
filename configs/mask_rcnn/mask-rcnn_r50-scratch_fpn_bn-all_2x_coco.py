# BN trained everywhere with the statistics of 2 images, from scratch.
# Published: box/mask AP 32.38/29.07 (megvii-model/MABN, README; checked).
# Source: megvii-model/MABN, README; fields of det/configs/e2e_mask_rcnn_R_50_FPN_syncbn_2x_from_scratch.yaml (that of
# BN is not there).
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 180k iterations.
_base_ = [
    "../_base_/mask_rcnn/bn-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/detectron-2x.py",
    "../_base_/recipes/maskrcnn-benchmark.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = dict(
    data_preprocessor=dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(style="caffe"),
    rpn_head={{_base_.recipe_model.rpn_head}},
    roi_head={{_base_.recipe_model.roi_head}},
    train_cfg={{_base_.recipe_model.train_cfg}},
)
optim_wrapper = {{_base_.recipe_optimizer}}
