# BN*, weight and bias frozen too, in a C4 model. Backbone and conv5 from MSRA's ResNet-50.
# Published: box AP 36.5 (Detectron, MODEL_ZOO.md; checked).
# Source: facebookresearch/Detectron, configs/12_2017_baselines/e2e_faster_rcnn_R-50-C4_2x.yaml.
# Differs: coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 1 images, 360k iterations; Detectron took 56.9 h on 8 P100.
_base_ = [
    "../_base_/faster_rcnn/c4_frozen-bn.py",
    "../_base_/coco/detection_8xb1.py",
    "../_base_/schedules/detectron-2x_8-images.py",
    "../_base_/recipes/detectron_c4.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
