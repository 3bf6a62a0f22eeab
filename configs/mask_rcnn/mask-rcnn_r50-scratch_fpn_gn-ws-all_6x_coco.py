# GN and standardized convolutions in the backbone, FPN and heads, from scratch.
# Published: nothing in this recipe.
# Source: our own experiment, in Detectron's recipe for GN from scratch, 6x.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Recipe: The control is the gn-all file.
# Cost: 8 GPUs x 2 images, 540k iterations.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/detectron-6x.py",
    "../_base_/recipes/detectron.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
