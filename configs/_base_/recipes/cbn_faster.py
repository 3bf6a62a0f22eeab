# What the recipe of CBN (mmdet 0.6) has and mmdet 3 has not: configs take these values over by name.
recipe_model = dict(
    rpn_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9)),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(loss_bbox=dict(type="SmoothL1Loss", beta=1.0)),
    ),
    train_cfg=dict(rpn=dict(allowed_border=0), rpn_proposal=dict(nms_pre=2000, max_per_img=2000)),
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=2000)),
)
