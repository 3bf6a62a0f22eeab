# GN in the backbone, FPN, box head and mask head, from scratch.
# Published: box/mask AP 39.5/35.2 (Detectron, projects/GN/README.md; checked).
# Source: facebookresearch/Detectron, configs/04_2018_gn_baselines/scratch_e2e_mask_rcnn_R-{50,101}-FPN_3x_gn.yaml.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 270k iterations; Detectron took 81.5 h on 8 P100.
_base_ = [
    "../_base_/mask_rcnn/gn-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/detectron-3x.py",
    "../_base_/recipes/detectron.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
