# Trained BN everywhere, from scratch, large scale jitter.
# Published: box/mask AP 42.1/37.8 (EvoNorm paper, arXiv 2004.02967; unverified).
# Source: arXiv 2004.02967, recalled, not read.
# Recipe: The source does not say which images BN's statistics come from: here the 8 of one GPU.
# Cost: 8 GPUs x 8 images, 73 epochs.
_base_ = [
    "../_base_/mask_rcnn/bn-scratch.py",
    "../_base_/coco/instance-lsj-72e_8xb8.py",
]
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)]),
)
