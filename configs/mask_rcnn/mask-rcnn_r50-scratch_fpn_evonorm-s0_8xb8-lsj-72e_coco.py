# EvoNorm-S0 everywhere, from scratch, large scale jitter.
# Published: box/mask AP 43.6/39.4 (EvoNorm paper, arXiv 2004.02967; unverified).
# Source: arXiv 2004.02967, recalled, not read.
# Recipe: The paper's recipe has not been compared with the paper. Post-activation residual blocks with an affine map
# before the sum: our own choice, the paper's are pre-activation.
# Cost: 8 GPUs x 8 images, 73 epochs.
_base_ = [
    "../_base_/mask_rcnn/evonorm-s0-scratch.py",
    "../_base_/coco/instance-lsj-72e_8xb8.py",
]
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=True)]),
)
