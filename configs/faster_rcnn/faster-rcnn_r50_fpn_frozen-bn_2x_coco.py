# BN* in the backbone, no norm elsewhere, two-layer box head.
# Published: box AP 38.4 (mmdet 3.3.0, metafile.yml; checked); box AP 37.9 (Detectron, MODEL_ZOO.md; checked).
# Source: mmdet 3.3.0, configs/faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py.
# Differs from Detectron, MODEL_ZOO.md: length 24 epochs (there 180000 iterations); lr / 10 after 16, 22 (there 120000,
# 160000); warm-up 500 iterations from 0.001 (there 500 iterations from 0.333); decay of norms 0.0001 (there 0); biases
# as weights (there lr x 2, decay x 0); input RGB, mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there BGR, mean
# 102.98 115.947 122.772, std 1); stride in 3x3 (there 1x1); proposals 2000 a level, then 1000 an image (there 2000 a
# level, then 2000 for the 2 images of a GPU); sampling ratio 0 (there 2); losses of boxes RPN L1, head L1 (there RPN
# smooth L1 (0.111), head smooth L1 (1)); anchors over the border used (there left out); coordinates continuous (there
# of whole pixels); weights torchvision://resnet50 (there open-mmlab://detectron2/resnet50_caffe); norms BN* (weight and
# bias trained) in backbone, none in FPN + box head (there BN* in backbone, none in FPN + box head).
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "mmdet::_base_/models/faster-rcnn_r50_fpn.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
