# GN and standardized convolutions in the backbone, FPN and heads, exactly the authors' batch.
# Published: box/mask AP 40.81/36.51 (joe-siyuan-qiao/maskrcnn-benchmark, README).
# Cost: 4 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/mask_rcnn/gn-ws-all.py",
    "../_base_/coco/instance_4xb2.py",
    "../_base_/schedules/20-23-24e.py",
    "../_base_/coco_runtime.py",
]
