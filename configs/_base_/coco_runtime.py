# What every COCO config ends with.
_base_ = ["mmdet::_base_/default_runtime.py", "./normplug.py"]
