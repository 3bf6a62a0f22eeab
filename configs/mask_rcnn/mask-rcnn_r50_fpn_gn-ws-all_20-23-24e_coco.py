# GN and weight standardization everywhere, with the late decay of the paper: 24 epochs, lr / 10 after 20 and 23.
# Published: box/mask AP 41.1/37.1 (mmdet 3.3.0); 40.81/36.51 (authors, 4 GPUs x 2 images).
# Cost: as the 2x file.
_base_ = [
    "mmdet::gn/../gn+ws/mask-rcnn_r50_fpn_gn-ws-all_20-23-24e_coco.py",  # see the 2x file for the path
    "../_base_/normplug.py",
]
