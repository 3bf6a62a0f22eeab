# GN in the backbone, FPN, box head and mask head, multi-scale training.
# Published: box/mask AP 42.6/38.6 (Detectron2, MODEL_ZOO.md; checked).
# Source: facebookresearch/detectron2, configs/Misc/mask_rcnn_R_50_FPN_3x_gn.yaml.
# Cost: 8 GPUs x 2 images, 270k iterations.
_base_ = [
    "../_base_/mask_rcnn/gn-all.py",
    "../_base_/coco/instance-ms_8xb2.py",
    "../_base_/schedules/detectron2-3x.py",
    "../_base_/coco_runtime_by-iteration.py",
]
optim_wrapper = dict(constructor="MergedOptimWrapperConstructor", paramwise_cfg=dict(norm_decay_mult=0.0))
