# GN with standardized convolutions in FPN, box head and mask head; backbone BN*.
_base_ = "./4conv1fc.py"
conv_cfg = dict(type="ConvWS")
norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
model = dict(
    neck=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    roi_head=dict(
        bbox_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg), mask_head=dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
    ),
)
