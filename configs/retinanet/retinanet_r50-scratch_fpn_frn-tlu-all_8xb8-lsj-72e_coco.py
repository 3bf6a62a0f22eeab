# FRN with its threshold (TLU) everywhere, from scratch, large scale jitter.
# Published: the FRN paper (arXiv 1911.09737) has a value that we could not recover.
# Source: our own experiment, in the recipe of the EvoNorm paper's Mask R-CNN as we recall it, lr 0.04.
# Recipe: The paper's recipe could not be recovered; this is the one of the Mask R-CNN files, lr 0.04. Warm-up of one
# epoch.
# Cost: 8 GPUs x 8 images, 73 epochs.
_base_ = [
    "../_base_/retinanet/frn-scratch.py",
    "../_base_/coco/detection-lsj-72e_8xb8.py",
]
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=False)]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=1833),
    dict(type="MultiStepLR", begin=0, end=135000, by_epoch=False, milestones=[120000, 125000], gamma=0.1),
]
