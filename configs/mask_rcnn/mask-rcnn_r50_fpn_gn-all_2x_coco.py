# GN in the backbone, FPN, box head and mask head: mmdet's own config, with one difference. As in the paper and in
# Detectron, weight and bias of the norms are not decayed (mmdet decays them by 1e-4).
# Published: box/mask AP 40.3/35.7 (arXiv 1803.08494, Table 6; Detectron); 40.2/36.4 (mmdet 3.3.0, with decay).
# Cost: 8 GPUs x 2 images, 24 epochs; Detectron took 50.8 h on 8 P100.
_base_ = ["mmdet::gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py", "../_base_/normplug.py"]
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
