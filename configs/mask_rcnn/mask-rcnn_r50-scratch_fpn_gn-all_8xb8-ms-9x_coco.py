# GN in the backbone, FPN, box head and mask head, from scratch, multi-scale training.
# Published: box/mask AP 43.7/39.6 (Detectron2, MODEL_ZOO.md).
# Recipe: No weight decay on the norms, as in the source.
# Cost: 8 GPUs x 8 images, 110 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-scratch.py",
    "../_base_/coco/instance-ms_8xb8.py",
    "../_base_/schedules/9x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
