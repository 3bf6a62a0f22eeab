# GN in the backbone, FPN and box head.
# Published: box AP 38.3 (switchablenorms/SwitchNorm_Detection, README; checked).
# Source: switchablenorms/SwitchNorm_Detection, configs/gn_baselines/e2e_mask_rcnn_R-50-FPN_2x_gn.yaml (that of Faster
# R-CNN is not there).
# Differs: box head 4conv1fc (there not stated); proposals 2000 a level, then 1000 an image (there 2000 a level, then
# 2000 for the 2 images of a GPU); coordinates continuous (there of whole pixels).
# Recipe: The authors' config of Faster R-CNN with GN is not in their repository; that of Mask R-CNN is, with a box head
# of four convolutions.
# Cost: 8 GPUs x 2 images, 180k iterations.
_base_ = [
    "../_base_/faster_rcnn/gn-all.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/detectron-2x.py",
    "../_base_/recipes/switchnorm_faster.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
