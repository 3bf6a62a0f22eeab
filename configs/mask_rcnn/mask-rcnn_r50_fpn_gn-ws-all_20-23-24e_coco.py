# GN and weight standardization everywhere, with the late decay of the paper: 24 epochs, lr / 10 after 20 and 23.
# Published: box/mask AP 41.1/37.1 (mmdet 3.3.0, metafile.yml; checked); box/mask AP 40.81/36.51
# (joe-siyuan-qiao/maskrcnn-benchmark, README; checked; at 4 x 2 samples).
# Source: mmdet 3.3.0, configs/gn+ws/mask-rcnn_r50_fpn_gn-ws-all_20-23-24e_coco.py.
# Differs from joe-siyuan-qiao/maskrcnn-benchmark, README: GPUs x samples 8 x 2 (there 4 x 2); lr 0.02 (there 0.01);
# length 24 epochs (there 360000 iterations); lr / 10 after 20, 23 (there 300000, 340000); warm-up 500 iterations from
# 0.001 (there 500 iterations from 0.333); biases as weights (there lr x 2, decay x 0, those of norms too); input RGB,
# mean 123.675 116.28 103.53, std 58.395 57.12 57.375 (there BGR, mean 102.98 115.947 122.772, std 1); proposals 2000 a
# level, then 1000 an image (there 2000 a level, then 2000 for the 2 images of a GPU); sampling ratio 0 (there 2);
# losses of boxes RPN L1, head L1 (there RPN smooth L1 (0.111), head smooth L1 (1)); anchors over the border used (there
# left out); coordinates continuous (there of whole pixels).
# Cost: as the 2x file.
_base_ = [
    "mmdet::gn/../gn+ws/mask-rcnn_r50_fpn_gn-ws-all_20-23-24e_coco.py",  # see the 2x file for the path
    "../_base_/normplug.py",
]
