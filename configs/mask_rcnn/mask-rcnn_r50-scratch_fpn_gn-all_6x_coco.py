# GN in the backbone, FPN, box head and mask head, from scratch.
# Published: box/mask AP 41.3/36.6 (Rethinking ImageNet Pre-training, arXiv 1811.08883, Table 2; checked); box/mask AP
# 41.2/37.4 (mmdet 3.3.0, metafile.yml; checked).
# Source: arXiv 1811.08883, section 4; what it leaves to Detectron, from Detectron's scratch_e2e files.
# Differs: proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU);
# coordinates continuous (there of whole pixels).
# Differs from mmdet 3.3.0, metafile.yml: length 540000 iterations (there 73 epochs); lr / 10 after 480000, 520000
# (there 65, 71); warm-up 500 iterations from 0.333 (there 500 iterations from 0.001); biases lr x 2, decay x 0 (there
# as weights); input BGR, mean 102.98 115.947 122.772, std 1 (there RGB, mean 123.675 116.28 103.53, std 58.395 57.12
# 57.375); sampling ratio 2 (there 0); losses of boxes RPN smooth L1 (0.111), head smooth L1 (1) (there RPN L1, head
# L1); anchors over the border left out (there used).
# Cost: 8 GPUs x 2 images, 540k iterations; estimate: 163 h on 8 P100, in proportion to the 81.5 h of Detectron's 3x
# run.
_base_ = [
    "../_base_/mask_rcnn/gn-scratch.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/detectron-6x.py",
    "../_base_/recipes/detectron.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = {{_base_.recipe_optimizer}}
