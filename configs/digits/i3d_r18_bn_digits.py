# Trained BN: 4 clips per batch, statistics over clips, time and space.
_base_ = ["../_base_/models/i3d_r18_digits.py", "../_base_/digits_video.py"]
