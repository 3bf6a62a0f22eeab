# BN* in the backbone (MSRA's ResNet-50; statistics, weight and bias frozen, as in Detectron), no norm elsewhere, box
# head of four convolutions: the control for GN in the box head.
# Published: box AP 38.6 (GN paper, arXiv 1803.08494, section 4.2; checked; at 8 x 1 samples); mask AP 34.2 (GN paper,
# arXiv 1803.08494, Table 5; unverified; at 8 x 1 samples); box/mask AP 38.8/34.4 (Detectron, projects/GN/README.md;
# checked).
# Source: facebookresearch/Detectron, projects/GN/README.md (a note),
# configs/12_2017_baselines/e2e_mask_rcnn_R-50-FPN_2x.yaml.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Differs from GN paper, arXiv 1803.08494, section 4.2: GPUs x samples 8 x 2 (there 8 x 1); lr 0.02 (there not stated);
# length 180000 iterations (there not stated); lr / 10 after 120000, 160000 (there not stated); input BGR, mean 102.98
# 115.947 122.772, std 1 (there not stated); stride in 1x1 (there not stated); proposals 2000 a level, then 1000 an
# image (there 2000 a level, then 2000 for the 2 images of a GPU); coordinates continuous (there of whole pixels);
# weights open-mmlab://detectron2/resnet50_caffe (there the authors' own BN ResNet-50).
# Differs from GN paper, arXiv 1803.08494, Table 5: GPUs x samples 8 x 2 (there 8 x 1); lr 0.02 (there not stated);
# length 180000 iterations (there not stated); lr / 10 after 120000, 160000 (there not stated); input BGR, mean 102.98
# 115.947 122.772, std 1 (there not stated); stride in 1x1 (there not stated); proposals 2000 a level, then 1000 an
# image (there 2000 a level, then 2000 for the 2 images of a GPU); coordinates continuous (there of whole pixels);
# weights open-mmlab://detectron2/resnet50_caffe (there the authors' own BN ResNet-50).
# Recipe: The paper trained with 1 image per GPU and its own BN ResNet-50, which it found as good as the one here,
# Detectron's default from MSRA; the number of iterations and lr for 1 image are not stated, so these are the released
# ones for 2.
# Cost: 8 GPUs x 2 images, 180k iterations; estimate: 45 h on 8 P100, in proportion to the 44.9 h of Detectron's 2x run
# of BN* ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/4conv1fc.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/detectron-2x.py",
    "../_base_/recipes/detectron.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = dict(
    data_preprocessor={{_base_.recipe_model.data_preprocessor}},
    backbone=dict(
        style="caffe",
        norm_cfg=dict(requires_grad=False),
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron2/resnet50_caffe"),
    ),
    rpn_head={{_base_.recipe_model.rpn_head}},
    roi_head={{_base_.recipe_model.roi_head}},
    train_cfg={{_base_.recipe_model.train_cfg}},
)
optim_wrapper = {{_base_.recipe_optimizer}}
