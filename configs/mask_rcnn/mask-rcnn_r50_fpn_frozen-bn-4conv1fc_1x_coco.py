# The control for every config with normalized heads: BN* backbone, no norm elsewhere, and the box head of four
# convolutions that such configs have. That head alone is worth up to 0.5 box AP, so comparing them with the two-layer
# head would credit the norm with it.
# Published: box/mask AP 37.8/34.2 (MMDetection report, arXiv 1906.07155, Table 7).
# Cost: 8 GPUs x 2 images, 12 epochs.
_base_ = "./mask-rcnn_r50_fpn_frozen-bn_1x_coco.py"
model = dict(roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256)))
