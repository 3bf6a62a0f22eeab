# EvoNorm-S0 in the backbone, FPN, box head and mask head, from timm's resnetv2_50d_evos.ah_in1k: a pre-activation
# ResNet-50 with the stem and the shortcuts of ResNet-D. tools/convert_checkpoint.py makes the file below of timm's.
# Published: nothing in this recipe.
# Source: our own experiment, in the recipe of mmdet 3.3.0's configs/gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py.
# Recipe: Images as timm's weights saw them, mean and std 127.5. Stem and first stage are frozen, as in mmdet.
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/evonorm-s0-head.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        _delete_=True,
        type="ResNetV2",
        depth=50,
        deep_stem=True,
        avg_down=True,
        conv_cfg=None,
        norm_cfg={{_base_.norm_cfg}},
        frozen_stages=1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/timm_resnetv2_50d_evos.ah_in1k.pth"),
    ),
)
