# I3D ResNet-50 with SyncBN, 64 consecutive frames.
# Published: nothing in this recipe.
# Recipe: The schedule is mmaction2's, not the paper's 400k iterations.
# Cost: 8 GPUs x 4 clips, 100 epochs.
_base_ = ["./i3d_r50_syncbn_8xb4-32x2x1-100e_kinetics400-rgb.py", "../_base_/kinetics/64x1.py"]
train_dataloader = dict(dataset=dict(pipeline={{_base_.clips_train}}))
val_dataloader = dict(dataset=dict(pipeline={{_base_.clips_val}}))
test_dataloader = dict(dataset=dict(pipeline={{_base_.clips_test}}))
