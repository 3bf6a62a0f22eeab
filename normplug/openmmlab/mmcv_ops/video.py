"""Shifts in time."""

import torch
from torch import Tensor

from normplug.openmmlab.mmcv_ops._common import op


def _shift_in_time(source: Tensor, target: Tensor, shift: Tensor, sign: int) -> None:
    length, channels = source.shape[1], source.shape[2]
    per_channel = shift.long().repeat_interleave(channels // shift.shape[1], dim=1)
    frame = torch.arange(length, device=source.device)
    origin = frame[None, :, None] - sign * per_channel[:, None]  # (N, T, C)
    inside = (origin >= 0) & (origin < length)
    index = origin.clamp(0, max(length - 1, 0))[..., None].expand_as(source)
    target.copy_(torch.where(inside[..., None], source.gather(1, index), 0.0))


@op
def tin_shift_forward(input: Tensor, shift: Tensor, output: Tensor) -> None:
    """Fill (N, T, C, HW) ``output``: channel group g of clip n moved ``shift[n, g]`` frames, zeros behind it."""
    _shift_in_time(input, output, shift, 1)


@op
def tin_shift_backward(grad_output: Tensor, shift: Tensor, grad_input: Tensor) -> None:
    """Fill ``grad_input``: the gradients moved back. (mmcv's kernel moves them on, which is not the gradient.)"""
    _shift_in_time(grad_output, grad_input, shift, -1)
