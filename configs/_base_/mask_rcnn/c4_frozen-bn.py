# C4: conv5 is the head of the RoIs. Backbone and conv5 from the same checkpoint, MSRA's.
_base_ = "mmdet::_base_/models/mask-rcnn_r50-caffe-c4.py"
model = dict(
    roi_head=dict(
        shared_head=dict(init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron2/resnet50_caffe"))
    )
)
