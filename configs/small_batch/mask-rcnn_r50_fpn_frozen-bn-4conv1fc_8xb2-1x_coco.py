# BN* in the backbone, no norm in the heads, 2 images per GPU.
# Published: box/mask AP 37.8/34.2 (MMDetection report, arXiv 1906.07155, Table 7; checked).
# Source: our own study, in the recipe of mmdet 3.3.0's configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py.
# Differs from MMDetection report, arXiv 1906.07155, Table 7: warm-up 500 iterations from 0.001 (there 500 iterations
# from 0.333); gradient clipping none (there norm 35); proposals 2000 a level, then 1000 an image (there 2000 a level,
# then 2000 an image); sampling ratio 0 (there 2); losses of boxes RPN L1, head L1 (there RPN smooth L1 (0.111), head
# smooth L1 (1)); anchors over the border used (there left out); coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/mask_rcnn/4conv1fc.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
