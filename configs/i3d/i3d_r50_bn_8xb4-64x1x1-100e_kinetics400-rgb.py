# I3D ResNet-50 with BN, 64 consecutive frames.
# Published: top-1/top-5 73.3/90.8 (GN paper, arXiv 1803.08494, Table 8).
# Recipe: The schedule is mmaction2's, not the paper's 400k iterations.
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = ["./i3d_r50_bn_8xb4-32x2x1-100e_kinetics400-rgb.py", "../_base_/kinetics/64x1.py"]
train_dataloader = dict(dataset=dict(pipeline={{_base_.clips_train}}))
val_dataloader = dict(dataset=dict(pipeline={{_base_.clips_val}}))
test_dataloader = dict(dataset=dict(pipeline={{_base_.clips_test}}))
