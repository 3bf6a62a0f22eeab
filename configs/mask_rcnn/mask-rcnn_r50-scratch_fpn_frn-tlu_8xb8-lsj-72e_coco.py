# FRN with its threshold (TLU) everywhere, from scratch, large scale jitter.
# Published: the EvoNorm paper has a value that we could not recover.
# Source: arXiv 2004.02967, recalled, not read.
# Recipe: The paper's recipe has not been compared with the paper. Warm-up of one epoch.
# Cost: 8 GPUs x 8 images, 73 epochs.
_base_ = [
    "../_base_/mask_rcnn/frn-scratch.py",
    "../_base_/coco/instance-lsj-72e_8xb8.py",
]
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=1833),
    dict(type="MultiStepLR", begin=0, end=135000, by_epoch=False, milestones=[120000, 125000], gamma=0.1),
]
