# CBN in FPN, box head and mask head on a BN* backbone: statistics over four iterations, this one and three before.
# Published: box/mask AP 38.4/34.7 (Howal/Cross-iterationBatchNorm, README); without any norm in the heads 37.6/34.0,
# SyncBN 38.5/34.3, GN 38.5/35.0 in the same place and recipe.
# The burn-in is 8 epochs of plain BN, counted in calls of a layer: 8 x 7,330 iterations of 16 images. That is what the
# authors' code means; run exactly as they shipped it, it burns in for 8 iterations, and they do not say which made
# the table. With another batch size, set burnin to 8 x 117,266 / images per iteration.
# Cost: 4 GPUs x 4 images, 12 epochs.
_base_ = "./mask-rcnn_r50_fpn_frozen-bn-4conv1fc_1x_coco.py"
norm_cfg = dict(type="CBN", buffer_num=3, burnin=58640, requires_grad=True)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
