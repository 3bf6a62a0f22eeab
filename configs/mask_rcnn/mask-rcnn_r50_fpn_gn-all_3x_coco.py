# GN in the backbone, FPN, box head and mask head.
# Published: box/mask AP 40.8/36.1 (Detectron, projects/GN/README.md; checked); box/mask AP 40.5/36.7 (mmdet 3.3.0,
# metafile.yml; checked).
# Source: facebookresearch/Detectron, configs/04_2018_gn_baselines/e2e_mask_rcnn_R-50-FPN_3x_gn.yaml.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Differs from mmdet 3.3.0, metafile.yml: length 270000 iterations (there 36 epochs); lr / 10 after 210000, 250000
# (there 28, 34); warm-up 500 iterations from 0.333 (there 500 iterations from 0.001); decay of norms 0 (there 0.0001);
# biases lr x 2, decay x 0 (there as weights); input BGR, mean 102.98 115.947 122.772, std 1 (there BGR, mean 103.53
# 116.28 123.675, std 1); sampling ratio 2 (there 0); losses of boxes RPN smooth L1 (0.111), head smooth L1 (1) (there
# RPN L1, head L1); anchors over the border left out (there used).
# Cost: 8 GPUs x 2 images, 270k iterations; Detectron took 77.4 h on 8 P100.
_base_ = [
    "../_base_/mask_rcnn/gn-all.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/detectron-3x.py",
    "../_base_/recipes/detectron.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
