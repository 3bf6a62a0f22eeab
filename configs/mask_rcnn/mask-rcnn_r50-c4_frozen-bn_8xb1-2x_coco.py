# BN*, weight and bias frozen too, in a C4 model: conv5 is the head of the RoIs. Backbone and conv5 from MSRA's
# ResNet-50, as in Detectron.
# Published: box/mask AP 37.8/32.8 (Detectron, MODEL_ZOO.md; checked); box/mask AP 37.7/32.8 (GN paper, arXiv
# 1803.08494, Table 4; unverified).
# Source: facebookresearch/Detectron, configs/12_2017_baselines/e2e_mask_rcnn_R-50-C4_2x.yaml.
# Differs: coordinates continuous (there of whole pixels).
# Differs from GN paper, arXiv 1803.08494, Table 4: coordinates continuous (there of whole pixels); weights
# open-mmlab://detectron2/resnet50_caffe (there the authors' own BN ResNet-50).
# Recipe: The paper's BN* model starts from its own BN ResNet-50, which it found as good as MSRA's.
# Cost: 8 GPUs x 1 images, 360k iterations; Detectron took 62.0 h on 8 P100.
_base_ = [
    "../_base_/mask_rcnn/c4_frozen-bn.py",
    "../_base_/coco/instance_8xb1.py",
    "../_base_/schedules/detectron-2x_8-images.py",
    "../_base_/recipes/detectron_c4.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
