"""Kernels of evonorm_b0."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from normplug.kernels import _by_channel
from normplug.kernels._launch import Step, dtypes_of, planned, stream_of, vector
from normplug.kernels._tiles import PER_CHANNEL, SIZES, Channels, Formula, load, store

__all__ = ["backward", "forward"]


@triton.jit
def _divisor(d, u):
    return tl.maximum(d, u, propagate_nan=tl.PropagateNan.ALL)  # a GPU's plain max takes the number and drops NaN


# Where other norms have 1/std, these two have the instance's std itself; u is the root of the batch's variance.
@triton.jit
def _value(x, _mean, std, weight, bias, v, u, _residual, _slope, ACT: tl.constexpr):
    return x / _divisor(v * x + std, u) * weight + bias


@triton.jit
def _grads(dy, x, _mean, std, weight, _bias, v, u, _residual, _slope, ACT: tl.constexpr):
    d = v * x + std
    is_bound = d <= u  # and not its opposite: NaN goes the way that keeps it
    d = _divisor(d, u)
    by_weight = dy * x / d
    g = by_weight / d
    above = tl.where(is_bound, 0.0, g)
    local = weight * dy * tl.where(is_bound, u, std) / d / d
    return local, dy, by_weight, above, g - above, above * x


EVONORM_B0 = Formula(_value, _grads, sums=5)


# Tile of samples x channels in which what belongs to instances is looked at.
TILE = {"ROWS": 32, "COLUMNS": 32}
# Parts of a sample from which on they are summed up for one sample after the other.
MANY = 8


@triton.jit(do_not_specialize=[*SIZES, "eps"], do_not_specialize_on_alignment=PER_CHANNEL)
def _variances(
    mean_ptr, m2_ptr, given_ptr, std_ptr, total_ptr, u_ptr, channels, samples, positions, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The instances' std, and the batch's variance: the mean of their variances and the variance of their means."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    var_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    mean_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, samples, ROWS):
        n = start + tl.arange(0, ROWS)[:, None]
        found = (n < samples) & (c < channels)
        at = n.to(tl.int64) * channels + c
        var = load(m2_ptr, at, found, 0.0) / positions
        store(std_ptr, at, tl.sqrt_rn(var + eps), found)
        var_sum += var
        mean_sum += load(mean_ptr, at, found, 0.0)
    if given_ptr is None:
        batch_mean = tl.sum(mean_sum, 0, keep_dims=True) / samples
        for start in range(0, samples, ROWS):
            n = start + tl.arange(0, ROWS)[:, None]
            found = (n < samples) & (c < channels)
            d = tl.where(found, load(mean_ptr, n.to(tl.int64) * channels + c, found, 0.0) - batch_mean, 0.0)
            var_sum += d * d
        total = tl.sum(var_sum, 0, keep_dims=True) / samples
    else:
        total = load(given_ptr, c, c < channels, 0.0)
    store(total_ptr, c, total, c < channels)
    store(u_ptr, c, tl.sqrt_rn(total + eps), c < channels)


@triton.jit
def _store_terms(t1_ptr, t2_ptr, mean_ptr, std_ptr, at, above, w, by_batch, batch_mean, positions, found):
    std = load(std_ptr, at, found, 1.0)
    store(t2_ptr, at, w * above / (std * positions) + by_batch, found)
    store(t1_ptr, at, by_batch * (load(mean_ptr, at, found, 0.0) - batch_mean), found)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=PER_CHANNEL)
def _terms(
    parts_ptr, mean_ptr, std_ptr, weight_ptr, u_ptr, t1_ptr, t2_ptr, dbias_ptr, dweight_ptr, dv_ptr,
    channels, samples, positions, splits, step, TRAINING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    """The gradients of parameters, and t1 and t2 of instances."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    s0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    s1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    s3 = tl.zeros((ROWS, COLUMNS), tl.float32)
    s4 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, samples * splits, ROWS):
        part = start + tl.arange(0, ROWS)[:, None]
        found = (part < samples * splits) & (c < channels)
        at = part.to(tl.int64) * channels + c
        s0 += load(parts_ptr, at, found, 0.0)
        s1 += load(parts_ptr + step, at, found, 0.0)
        s3 += load(parts_ptr + 3 * step, at, found, 0.0)
        s4 += load(parts_ptr + 4 * step, at, found, 0.0)
    w = load(weight_ptr, c, c < channels, 1.0)
    store(dbias_ptr, c, tl.sum(s0, 0, keep_dims=True), c < channels)
    store(dweight_ptr, c, tl.sum(s1, 0, keep_dims=True), c < channels)
    store(dv_ptr, c, -w * tl.sum(s4, 0, keep_dims=True), c < channels)
    # (x - mean) * a + (x - batch_mean) * b = (x - mean) * (a + b) + (mean - batch_mean) * b, without cancellation
    by_batch = tl.zeros_like(w)
    batch_mean = tl.zeros_like(w)
    if TRAINING:
        u = load(u_ptr, c, c < channels, 1.0)
        by_batch = w * tl.sum(s3, 0, keep_dims=True) / (samples.to(tl.float32) * positions * u)
        mean_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, samples, ROWS):
            n = start + tl.arange(0, ROWS)[:, None]
            mean_sum += load(mean_ptr, n.to(tl.int64) * channels + c, (n < samples) & (c < channels), 0.0)
        batch_mean = tl.sum(mean_sum, 0, keep_dims=True) / samples
    if splits >= MANY:  # parts of a sample at a time; there are few samples then
        for n in range(samples):
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, splits, ROWS):
                split = start + tl.arange(0, ROWS)[:, None]
                at = (split.to(tl.int64) + n * splits) * channels + c
                sums += load(parts_ptr + 2 * step, at, (split < splits) & (c < channels), 0.0)
            above = tl.sum(sums, 0, keep_dims=True)
            at = c + n * channels
            _store_terms(t1_ptr, t2_ptr, mean_ptr, std_ptr, at, above, w, by_batch, batch_mean, positions, c < channels)
    else:  # samples at a time
        for start in range(0, samples, ROWS):
            n = start + tl.arange(0, ROWS)[:, None]
            found = (n < samples) & (c < channels)
            above = tl.zeros((ROWS, COLUMNS), tl.float32)
            for split in range(splits):
                above += load(parts_ptr + 2 * step, (n.to(tl.int64) * splits + split) * channels + c, found, 0.0)
            at = n.to(tl.int64) * channels + c
            _store_terms(t1_ptr, t2_ptr, mean_ptr, std_ptr, at, above, w, by_batch, batch_mean, positions, found)


@planned
def _plan(
    samples: int, channels: int, positions: int, _device: int, eps: float, splits: int, training: bool,
    _given: tuple[torch.dtype | None, ...],
) -> tuple[Step, Step]:  # fmt: skip
    programs, sizes = triton.cdiv(channels, TILE["COLUMNS"]), [channels, samples, positions]
    step = samples * splits * channels
    return (
        Step(_variances, programs, [*sizes, eps], TILE),
        Step(_terms, programs, [*sizes, splits, step], {"TRAINING": training, **TILE, "MANY": MANY}),
    )


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor, batch_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map x (N, C, *), laid out in either way, to y, mean and std of instances (N, C), and batch variance (C,)."""
    n, c = x.shape[:2]
    if x.numel() == 0:
        mean, std, total = (x.new_zeros(shape, dtype=torch.float32) for shape in ((n, c), (n, c), c))
        return torch.empty_like(x), mean, std, total if batch_var is None else batch_var.float().clone()
    mean, m2 = _by_channel.statistics(x, per_sample=True)
    std, total = torch.empty_like(m2), x.new_empty(c, dtype=torch.float32)
    bound = torch.empty_like(total)
    batch_var, device = vector(batch_var), x.get_device()
    variances, _ = _plan(n, c, x.shape[2:].numel(), device, eps, 1, True, dtypes_of(batch_var))
    variances(stream_of(device), mean, m2, batch_var, std, total, bound)
    given = Channels(mean, std, weight, bias, v, bound)
    return _by_channel.apply(EVONORM_B0, x, given, None, None), mean, std, total


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    batch_var: Tensor,
    weight: Tensor | None,
    v: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and v (C,); the formula is in ``ops.evonorm_b0``."""
    n, c = x.shape[:2]
    if x.numel() == 0:
        zeros = x.new_zeros(3, c, dtype=torch.float32)
        return torch.empty_like(x), *(z.clone() for z in zeros)
    bound = (batch_var + eps).sqrt_()
    given = Channels(mean, std, weight, None, v, bound)
    parts, splits = _by_channel.sums(EVONORM_B0, dy, x, given, None, None)
    t1, t2 = torch.empty_like(mean), torch.empty_like(mean)
    dbias = torch.empty_like(bound)
    dweight, dv = torch.empty_like(dbias), torch.empty_like(dbias)
    weight, device = vector(weight), x.get_device()
    _, terms = _plan(n, c, x.shape[2:].numel(), device, eps, splits, training, dtypes_of(weight))
    terms(stream_of(device), parts, mean, std, weight, bound, t1, t2, dbias, dweight, dv)
    dx, _ = _by_channel.gradient(EVONORM_B0, dy, x, given, t1, t2, None, None)
    return dx, dweight, dbias, dv
