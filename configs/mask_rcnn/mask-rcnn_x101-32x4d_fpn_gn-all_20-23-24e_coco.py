# GN without weight standardization, x101-32x4d, late decay: the contrast to the gn-ws-all file.
# Published: box/mask AP 36.6/33.4 (mmdet 1, configs/gn+ws/README.md, in iVMCL/AttentiveNorm_Detection; checked).
# Source: mmdet 1, configs/gn+ws/mask_rcnn_r50_fpn_gn_ws_20_23_24e.py without WS, read in iVMCL/AttentiveNorm_Detection.
# Differs: warm-up 500 iterations from 0.001 (there 500 iterations from 0.333); gradient clipping none (there norm 35);
# proposals 2000 a level, then 1000 an image (there 2000 a level, then 2000 an image); sampling ratio 0 (there 2);
# losses of boxes RPN L1, head L1 (there RPN smooth L1 (0.111), head smooth L1 (1)); anchors over the border used (there
# left out); coordinates continuous (there of whole pixels).
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/20-23-24e.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    backbone=dict(
        type="ResNeXt",
        depth=101,
        groups=32,
        base_width=4,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnext101_32x4d_gn"),
    )
)
