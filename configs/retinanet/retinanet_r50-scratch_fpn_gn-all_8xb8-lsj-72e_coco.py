# GN everywhere, from scratch, large scale jitter.
# Published: the FRN paper (arXiv 1911.09737) has a value that we could not recover.
# Source: our own experiment, in the recipe of the EvoNorm paper's Mask R-CNN as we recall it, lr 0.04.
# Recipe: The paper's recipe could not be recovered; this is the one of the Mask R-CNN files, lr 0.04.
# Cost: 8 GPUs x 8 images, 73 epochs.
_base_ = [
    "../_base_/retinanet/gn-scratch.py",
    "../_base_/coco/detection-lsj-72e_8xb8.py",
]
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type="BatchFixedSizePad", size=(1024, 1024), pad_mask=False)]),
)
