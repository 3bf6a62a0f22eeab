# GN in the backbone, FPN, box head and mask head, from timm's resnet50_gn.a1h_in1k. timm calls its GroupNorms bnN,
# mmdet gnN: tools/convert_checkpoint.py makes the file below of timm's.
# Published: nothing in this recipe.
# Source: our own experiment, in the recipe of mmdet 3.3.0's configs/gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py.
# Recipe: Norms are decayed by 1e-4, as mmdet does it; the GN paper does not decay them.
# Cost: 8 GPUs x 2 images, 24 epochs; estimate: 51 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of GN
# ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/gn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="checkpoints/timm_resnet50_gn.a1h_in1k.pth")))
