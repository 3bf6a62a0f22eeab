# GN in the backbone, FPN, box head and mask head, from a GN network trained on RGB images.
# Published: box/mask AP 40.1/36.2 (mmdet 3.3.0, metafile.yml; checked).
# Source: mmdet 3.3.0, configs/gn/mask-rcnn_r50-contrib_fpn_gn-all_3x_coco.py.
# Recipe: Norms are decayed by 1e-4, as mmdet does it; the GN paper does not decay them.
# Cost: 8 GPUs x 2 images, 36 epochs; estimate: 76 h on 8 P100, in proportion to the 50.8 h of Detectron's 2x run of GN
# ResNet-50.
_base_ = [
    "../_base_/mask_rcnn/gn-everywhere.py",
    "../_base_/coco/instance_8xb2.py",
    "../_base_/schedules/3x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://contrib/resnet50_gn")))
