# GN and weight standardization in the backbone, FPN, box head and mask head: exactly mmdet's own config, which decays
# the norms too (1e-4); the published number was trained like that.
# Published: box/mask AP 40.6/36.6 (mmdet 3.3.0, metafile.yml; checked).
# Source: mmdet 3.3.0, configs/gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py.
# Cost: 8 GPUs x 2 images, 24 epochs; about 5 % more than GN in time and memory (mmdet v1).
_base_ = [
    "mmdet::gn/../gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py",  # mmengine wants a first folder without a plus sign
    "../_base_/normplug.py",
]
