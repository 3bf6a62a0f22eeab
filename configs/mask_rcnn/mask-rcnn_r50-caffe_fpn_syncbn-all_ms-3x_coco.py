# SyncBN everywhere, from the MSRA ResNet-50 (stride in the 1x1 convolution, BGR), multi-scale training.
# Published: box/mask AP 41.9/37.8 (Detectron2, MODEL_ZOO.md; checked).
# Source: facebookresearch/detectron2, configs/Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml.
# Cost: 8 GPUs x 2 images, 270k iterations.
_base_ = [
    "../_base_/mask_rcnn/syncbn-everywhere.py",
    "../_base_/coco/instance-ms_8xb2.py",
    "../_base_/schedules/detectron2-3x.py",
    "../_base_/coco_runtime_by-iteration.py",
]
custom_hooks = [dict(type="PreciseBNHook", num_batches=200)]
model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(style="caffe", init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron2/resnet50_caffe")),
)
optim_wrapper = dict(constructor="MergedOptimWrapperConstructor", paramwise_cfg=dict(norm_decay_mult=0.0))
