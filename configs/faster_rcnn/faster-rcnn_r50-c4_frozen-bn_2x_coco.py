# BN*, weight and bias frozen too, in a C4 model.
# Published: box AP 36.5 (switchablenorms/SwitchNorm_Detection, README).
# Cost: 8 GPUs x 2 images, 24 epochs.
_base_ = [
    "../_base_/faster_rcnn/c4_frozen-bn.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/2x.py",
    "../_base_/coco_runtime.py",
]
