# Trained BN everywhere: 2 images per batch are what breaks it.
_base_ = ["../_base_/models/mask-rcnn_r18_fpn_digits.py", "../_base_/digits_detection.py"]
