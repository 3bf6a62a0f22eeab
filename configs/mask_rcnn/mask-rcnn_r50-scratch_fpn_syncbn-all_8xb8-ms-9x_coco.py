# SyncBN everywhere, from scratch, multi-scale training.
# Published: box/mask AP 43.6/39.3 (Detectron2, MODEL_ZOO.md; checked).
# Source: facebookresearch/detectron2, configs/Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml.
# Cost: 8 GPUs x 8 images, 202.5k iterations.
_base_ = [
    "../_base_/mask_rcnn/syncbn-scratch.py",
    "../_base_/coco/instance-ms_8xb8.py",
    "../_base_/schedules/detectron2-9x.py",
    "../_base_/coco_runtime_by-iteration.py",
]
custom_hooks = [dict(type="PreciseBNHook", num_batches=200)]
model = dict(data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], bgr_to_rgb=False))
optim_wrapper = dict(constructor="MergedOptimWrapperConstructor", paramwise_cfg=dict(norm_decay_mult=0.0))
