# 8 GPUs x 8 images of 1024x1024, large scale jitter, 100 epochs (25 of a data set repeated 4 times), mixed precision.
_base_ = ["mmdet::common/lsj-100e_coco-instance.py", "../normplug.py"]
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(type="AmpOptimWrapper")
