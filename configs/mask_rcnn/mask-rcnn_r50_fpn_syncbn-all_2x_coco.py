# SyncBN everywhere, nothing frozen.
# Published: box/mask AP 38.25/34.22 (megvii-model/MABN, README; checked).
# Source: megvii-model/MABN, det/configs/e2e_mask_rcnn_R_50_FPN_syncbn_2x_fine_tune.yaml.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels); weights open-mmlab://detectron2/resnet50_caffe (there the authors'
# R-50-2.pkl).
# Recipe: The authors' weights are R-50-2.pkl of their own; MSRA's have the same stride and input.
# Cost: 8 GPUs x 2 images, 180k iterations.
_base_ = [
    "../_base_/mask_rcnn/syncbn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/detectron-2x.py",
    "../_base_/recipes/maskrcnn-benchmark.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = dict(
    data_preprocessor=dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(
        frozen_stages=-1,
        style="caffe",
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron2/resnet50_caffe"),
    ),
    rpn_head={{_base_.recipe_model.rpn_head}},
    roi_head={{_base_.recipe_model.roi_head}},
    train_cfg={{_base_.recipe_model.train_cfg}},
)
optim_wrapper = {{_base_.recipe_optimizer}}
