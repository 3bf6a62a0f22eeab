# GN in the backbone, FPN and box head.
# Published: box AP 38.3 (switchablenorms/SwitchNorm_Detection, README).
# Recipe: Norms are decayed by 1e-4, as mmdet does it; the GN paper does not decay them.
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/faster_rcnn/gn-all.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
