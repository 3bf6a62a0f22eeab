# GN in a C4 model: in the backbone and in conv5, the head of the RoIs.
# Published: box/mask AP 38.8/33.6 (GN paper, arXiv 1803.08494, Table 4; unverified).
# Source: arXiv 1803.08494, section 4.2, and facebookresearch/Detectron,
# configs/12_2017_baselines/e2e_mask_rcnn_R-50-C4_2x.yaml.
# Differs: coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 1 images, 360k iterations.
_base_ = [
    "../_base_/mask_rcnn/c4_gn.py",
    "../_base_/coco/instance_8xb1.py",
    "../_base_/schedules/detectron-2x_8-images.py",
    "../_base_/recipes/detectron_c4.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
