# What every COCO config ends with whose schedule counts iterations.
_base_ = "./coco_runtime.py"
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=15000, max_keep_ckpts=3))
log_processor = dict(by_epoch=False)
