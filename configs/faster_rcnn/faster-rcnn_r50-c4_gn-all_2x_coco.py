# GN in the backbone and conv5 of a C4 model.
# Published: box AP 37.3 (switchablenorms/SwitchNorm_Detection, README; checked).
# Source: switchablenorms/SwitchNorm_Detection, README and configs/sn_baselines/e2e_faster_rcnn_R-50-C4_2x_sn.yaml (that
# of GN is not there).
# Differs: frozen stages stem to 1 (there not stated); RoIs 512 (there not stated); coordinates continuous (there of
# whole pixels).
# Recipe: What the authors' table calls GN has no config in their repository.
# Cost: 8 GPUs x 2 images, 180k iterations.
_base_ = [
    "../_base_/faster_rcnn/c4_gn.py",
    "../_base_/coco/detection_8xb2.py",
    "../_base_/schedules/detectron-2x.py",
    "../_base_/recipes/detectron_c4.py",
    "../_base_/coco_runtime_by-iteration.py",
]
model = {{_base_.recipe_model}}
optim_wrapper = dict(
    constructor="MergedOptimWrapperConstructor",
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={".bias": dict(lr_mult=2.0, decay_mult=0.0)}),
)
