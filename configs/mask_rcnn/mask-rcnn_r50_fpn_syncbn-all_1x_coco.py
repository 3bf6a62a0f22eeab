# SyncBN in the backbone, FPN, box head and mask head: statistics over the 16 images of all GPUs. The stem and the
# first stage are frozen, their statistics included.
# Published: box/mask AP 38.9/35.2 (MMDetection report, arXiv 1906.07155, Table 7).
# Cost: 8 GPUs x 2 images, 12 epochs. On fewer GPUs the statistics come from fewer images: another experiment.
_base_ = "./mask-rcnn_r50_fpn_frozen-bn-4conv1fc_1x_coco.py"
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=norm_cfg, norm_eval=False),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
