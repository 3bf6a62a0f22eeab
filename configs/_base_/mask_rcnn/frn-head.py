# FRN with its threshold (TLU) in FPN, box head and mask head; backbone BN*.
_base_ = "./4conv1fc.py"
norm_cfg = dict(type="FRN", eps=1e-6, requires_grad=True)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
