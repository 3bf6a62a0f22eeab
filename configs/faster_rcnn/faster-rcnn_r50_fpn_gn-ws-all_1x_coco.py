# GN and standardized convolutions in the backbone, FPN and heads, r50.
# Published: box AP 39.7 (mmdet 3.3.0, metafile.yml; checked); box AP 39.36 (joe-siyuan-qiao/maskrcnn-benchmark, README;
# checked; at 4 x 2 samples).
# Source: mmdet 3.3.0, configs/gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py.
# Differs from joe-siyuan-qiao/maskrcnn-benchmark, README: GPUs x samples 8 x 2 (there 4 x 2); lr 0.02 (there 0.01);
# length 12 epochs (there 180000 iterations); lr / 10 after 8, 11 (there 120000, 160000); warm-up 500 iterations from
# 0.001 (there 500 iterations from 0.333); biases as weights (there lr x 2, decay x 0, those of norms too); input RGB,
# mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there BGR, mean 102.98 115.947 122.772, std 1); proposals 2000 a
# level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU); sampling ratio 0 (there 2);
# losses of boxes RPN L1, head L1 (there RPN smooth L1 (0.111), head smooth L1 (1)); anchors over the border used (there
# left out); coordinates continuous (there of whole pixels).
# Recipe: The authors trained with 8 or 4 images per iteration.
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = [
    "../_base_/faster_rcnn/gn-ws-all.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/1x.py",
    "../_base_/coco_runtime.py",
]
