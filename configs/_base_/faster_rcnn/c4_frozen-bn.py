# C4: conv5 is the head of the RoIs. Backbone and conv5 from the same checkpoint, MSRA's.
_base_ = "mmdet::_base_/models/faster-rcnn_r50-caffe-c4.py"
