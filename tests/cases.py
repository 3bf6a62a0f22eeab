"""The table of layers that the generic tests run over: config name, formula in float64, arguments.

A formula is the paper's mathematics in plain torch, without the package's code. It takes the input and, by
keyword, the layer's parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    layer: str
    formula: Callable[..., torch.Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    training: bool = True  # the mode whose formula this is
    single: bool = True  # defined for a single value per channel and sample

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


# Groups of two values are left out: x̂ is ±1 there and its gradient a difference of rounding errors.
CASES = [
    Case("GN", group_norm(2), {"num_groups": 2}),
    Case("GN", group_norm(1), {"channels_per_group": 6}, id="GN-by-size"),
    Case("GN", group_norm(1, torch.relu), {"num_groups": 1, "act": "relu"}, id="GN-relu"),
    Case("GN", group_norm(2, torch.nn.functional.silu), {"num_groups": 2, "act": "silu"}, id="GN-silu"),
]
