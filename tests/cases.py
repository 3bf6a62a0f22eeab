"""The table of layers that the generic tests run over: config name, formula in float64, arguments.

A formula is the paper's mathematics in plain torch, without the package's code. It takes the input and, by
keyword, the layer's parameters.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = "interpreted" in sys.modules  # the plugin that puts kernels in the place of CPU implementations
# Half types may be wrong by their own last rounding, half a unit; Triton's interpreter cuts bfloat16 off instead.
BFLOAT16_ULPS = 1.1 if INTERPRETED else 0.6


@dataclass(frozen=True)
class Case:
    layer: str
    formula: Callable[..., torch.Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    training: bool = True  # the mode whose formula this is
    single: bool = True  # defined for a single value per channel and sample
    pairs: bool = True  # fit to compare on two values per channel; else x̂ is ±1 there, whatever x
    condition: int = 1  # by how much the formula enlarges rounding errors, the float64 oracle's own included

    def __str__(self) -> str:
        return self.id or self.layer


def channelwise(v, x):
    return v.view(1, -1, *[1] * (x.ndim - 2))


def standardized(x, dims, eps=1e-5):
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


def group_norm(num_groups, act=lambda z: z):
    def formula(x, weight, bias):
        groups = x.unflatten(1, (num_groups, -1))
        x_hat = standardized(groups, tuple(range(2, groups.ndim))).flatten(1, 2)
        return act(x_hat * channelwise(weight, x) + channelwise(bias, x))

    return formula


def affine(x, weight, bias):
    return x * channelwise(weight, x) + channelwise(bias, x)


def variance(x, dims):
    return (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True)


def evonorm_s0(num_groups, eps=1e-5):
    def formula(x, weight, bias, v):
        groups = x.unflatten(1, (num_groups, -1))
        std = (variance(groups, tuple(range(2, groups.ndim))) + eps).sqrt()
        gated = (x * torch.sigmoid(channelwise(v, x) * x)).unflatten(1, (num_groups, -1))
        return affine((gated / std).flatten(1, 2), weight, bias)

    return formula


def evonorm_b0(batch_var=None, eps=1e-5):
    def formula(x, weight, bias, v):
        maps = x.reshape(*x.shape[:2], x.shape[2:].numel())  # without spatial axes an instance is one value
        batch = variance(maps, (0, 2)) if batch_var is None else torch.as_tensor(batch_var).to(x).view(1, -1, 1)
        instance = (variance(maps, (2,)) + eps).sqrt()
        divisor = torch.maximum((batch + eps).sqrt(), channelwise(v, maps) * maps + instance)
        return affine((maps / divisor).reshape(x.shape), weight, bias)

    return formula


def frn(eps=1e-6):
    def formula(x, weight, bias, tau=None, eps_l=0.0):
        maps = x.reshape(*x.shape[:2], x.shape[2:].numel())  # without spatial axes a map is one value
        square = maps.square().mean(2).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        learned = channelwise(eps_l, x) if isinstance(eps_l, torch.Tensor) else eps_l
        z = affine(x / (square + eps + abs(learned)).sqrt(), weight, bias)
        return z if tau is None else torch.maximum(z, channelwise(tau, x))

    return formula


def batch_norm(act=lambda z: z):
    def formula(x, weight, bias):
        return act(affine(standardized(x, (0, *range(2, x.ndim))), weight, bias))

    return formula


def running_norm(act=lambda z: z, eps=1e-5):
    """Batch norm by the running statistics of a new layer: mean 0 and variance 1."""

    def formula(x, weight, bias):
        return act(affine(x / (1 + eps) ** 0.5, weight, bias))

    return formula


# Groups of two values are left out: x̂ is ±1 there and its gradient a difference of rounding errors.
CASES = [
    Case("GN", group_norm(2), {"num_groups": 2}),
    Case("GN", group_norm(1), {"channels_per_group": 6}, id="GN-by-size"),
    Case("GN", group_norm(1, torch.relu), {"num_groups": 1, "act": "relu"}, id="GN-relu"),
    Case("GN", group_norm(2, torch.nn.functional.silu), {"num_groups": 2, "act": "silu"}, id="GN-silu"),
    Case("EvoNormS0", evonorm_s0(2), {"num_groups": 2}),
    Case("EvoNormS0", evonorm_s0(1), {"channels_per_group": 6}, id="EvoNormS0-by-size"),
    Case("EvoNormS0", affine, {"apply_act": False}, id="EvoNormS0-affine"),
    # For v < 0 the divisor v x + std cancels.
    Case("EvoNormB0", evonorm_b0(), single=False, condition=4),
    Case("EvoNormB0", evonorm_b0(batch_var=1.0), training=False, id="EvoNormB0-eval", condition=4),
    Case("EvoNormB0", affine, {"apply_act": False}, id="EvoNormB0-affine"),
    # Over a single value x̂ is the sign of x, but for eps: an eps of 1 leaves it a gradient that can be compared.
    *(
        Case("FRN", frn(eps=1.0), {"eps": 1.0, **kwargs}, id=f"FRN{id}", condition=4)
        for id, kwargs in {
            "": {},
            "-no-act": {"apply_act": False},
            "-learned-eps": {"learnable_eps": True},
            "-learned-eps-per-channel": {"learnable_eps": True, "eps_per_channel": True},
        }.items()
    ),
    Case("FrozenBatchNorm", lambda x: x / (1 + 1e-5) ** 0.5),
    Case("FrozenBatchNorm", lambda x: (x / (1 + 1e-5) ** 0.5).relu(), {"act": "relu"}, id="FrozenBatchNorm-relu"),
    Case("BNAct", batch_norm(), single=False, pairs=False),
    Case("BNAct", batch_norm(F.silu), {"act": "silu"}, id="BNAct-silu", single=False, pairs=False),
    Case("BNAct", running_norm(F.gelu), {"act": "gelu"}, training=False, id="BNAct-gelu-eval"),
    Case("SyncBN", batch_norm(), single=False, pairs=False),
    Case("SyncBN", batch_norm(torch.relu), {"act": "relu"}, id="SyncBN-relu", single=False, pairs=False),
    Case("SyncBN", running_norm(), training=False, id="SyncBN-eval"),
    Case("SyncBN", running_norm(F.silu), {"act": "silu"}, training=False, id="SyncBN-silu-eval"),
]


def unpadded(markdown: str) -> str:
    """Return tables as they would be without the spaces that align their columns."""
    return re.sub(r" +\|", " |", re.sub(r"\| +", "| ", markdown))
