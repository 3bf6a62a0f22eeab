# SyncBN in FPN and box head; backbone BN*.
_base_ = "./4conv1fc.py"
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)),
)
