# GN in the backbone, FPN, box head and mask head, multi-scale training.
# Published: box/mask AP 42.6/38.6 (Detectron2, MODEL_ZOO.md).
# Recipe: No weight decay on the norms, as in the source.
# Cost: 8 GPUs x 2 images, 36 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-all.py",
    "../_base_/coco/instance-ms_8xb2.py",
    "../_base_/schedules/3x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
