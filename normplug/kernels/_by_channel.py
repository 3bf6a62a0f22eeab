"""The passes one by one, for norms that do something between them: an all-reduce, or the variance of a batch."""

import torch
from torch import Tensor

from normplug.kernels._groups import is_channels_last
from normplug.kernels._launch import Step, dtypes_of, gates, like, planned, stream_of, vector
from normplug.kernels._passes import Parts, Pass, Statistics, apply_step, gradient_step, sums_step
from normplug.kernels._tiles import Channels, Formula

__all__ = ["apply", "gradient", "statistics", "sums"]


@planned
def _statistics(
    shape: torch.Size, stride: tuple[int, ...], _dtype: torch.dtype, device: int, per_sample: bool
) -> tuple[Step, int, int]:
    plan = Statistics.of(shape, is_channels_last(shape, stride), shape[1], per_sample, device)
    return plan.step(0.0), plan.workspace, plan.gathering.gates


def statistics(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations of channels: (N, C), or over all samples (C,)."""
    step, workspace, number = _statistics(x.shape, x.stride(), x.dtype, x.get_device(), per_sample)
    stream = stream_of(x.get_device())
    x = like(x, x)
    parts = x.new_empty(workspace, dtype=torch.float32)
    mean = x.new_empty(x.shape[: 1 + per_sample] if per_sample else x.shape[1], dtype=torch.float32)
    m2 = torch.empty_like(mean)
    step(stream, x, parts, mean, None, m2, gates(x, stream, number))
    return mean, m2


@planned
def _apply(
    formula: Formula, shape: torch.Size, stride: tuple[int, ...], _dtype: torch.dtype, device: int, groups: int,
    per_sample: bool, act: str | None, _given: tuple[torch.dtype | None, ...],
) -> Step:  # fmt: skip
    given = Pass.over(shape, is_channels_last(shape, stride), groups, per_sample)
    return apply_step(formula, given, act, device)


def apply(formula: Formula, x: Tensor, given: Channels, act: str | None, residual: Tensor | None) -> Tensor:
    """Return the formula's value at every x, with the activation behind it."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    given = Channels(*map(vector, given))
    device = x.get_device()
    step = _apply(
        formula, x.shape, x.stride(), x.dtype, device, given.groups, given.per_sample, act, dtypes_of(*given, residual)
    )
    residual = None if residual is None else like(residual, y)
    step(stream_of(device), like(x, y), y, residual, *given)
    return y


@planned
def _sums(
    formula: Formula, shape: torch.Size, stride: tuple[int, ...], _dtype: torch.dtype, device: int, groups: int,
    per_sample: bool, act: str | None, _given: tuple[torch.dtype | None, ...],
) -> tuple[Step, Parts]:  # fmt: skip
    given = Pass.over(shape, is_channels_last(shape, stride), groups, per_sample, formula.sums)
    parts = Parts.of(given.at, given.tiles, given.batches, device)
    return sums_step(formula, given, parts, act), parts


def sums(
    formula: Formula, dy: Tensor, x: Tensor, given: Channels, act: str | None, residual: Tensor | None
) -> tuple[Tensor, int]:
    """Return the partial sums (formula.sums, parts, C) of every batch, one after the other, and parts per batch."""
    given = Channels(*map(vector, given))
    device = x.get_device()
    step, parts = _sums(
        formula, x.shape, x.stride(), x.dtype, device, given.groups, given.per_sample, act, dtypes_of(*given, residual)
    )
    out = x.new_empty(formula.sums, parts.number, x.shape[1], dtype=torch.float32)
    residual = None if residual is None else like(residual, x)
    step(stream_of(device), like(dy, x), like(x, x), residual, *given, out, None, None, None)
    return out, parts.splits


@planned
def _gradient(
    formula: Formula, shape: torch.Size, stride: tuple[int, ...], _dtype: torch.dtype, device: int, groups: int,
    per_sample: bool, act: str | None, _given: tuple[torch.dtype | None, ...],
) -> Step:  # fmt: skip
    given = Pass.over(shape, is_channels_last(shape, stride), groups, per_sample)
    return gradient_step(formula, given, act, device)


def gradient(
    formula: Formula, dy: Tensor, x: Tensor, given: Channels, t1: Tensor | None, t2: Tensor | None,
    act: str | None, residual: Tensor | None, wants_dz: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dx = local - t1 - (x - mean) * t2, and the first of the formula's five where asked for (else empty)."""
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if wants_dz else None
    none = x.new_empty(0) if dz is None else dz
    if x.numel() == 0:
        return dx, none
    given = Channels(*map(vector, given))
    device = x.get_device()
    present = dtypes_of(*given, residual, t1, t2, dz)
    step = _gradient(formula, x.shape, x.stride(), x.dtype, device, given.groups, given.per_sample, act, present)
    residual = None if residual is None else like(residual, dx)
    step(
        stream_of(device), like(dy, dx), like(x, dx), residual, *given, vector(t1), vector(t2), None, dx, dz,
        None, None, None,
    )  # fmt: skip
    return dx, none
