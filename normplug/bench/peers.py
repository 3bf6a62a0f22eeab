"""The peers of each op: what users have today. A peer whose package is missing is left out, and said to be.

Every peer computes the same from tensors of its own: in half precision the parameters are half too where the peer
wants that ("torch autocast" is what a stock model does under AMP: float32 parameters and a float32 copy).
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normplug.bench.cases import EPS, GROUPS, Problem, Tensors

__all__ = ["PEERS", "Contender", "installed", "peers_of", "versions"]

PACKAGES = {"timm": "timm", "apex": "apex", "liger": "liger-kernel", "mmcv": "mmcv"}
PEERS = ["torch eager", "torch autocast", "torch.compile", "timm", "timm compiled", "apex", "liger", "mmcv"]
Function = Callable[..., Tensor | Sequence[Tensor]]


@dataclass
class Contender:
    """Something to check and time: a function of nothing, and the tensors whose gradients count, by name."""

    name: str
    call: Callable[[], Tensor | Sequence[Tensor]]
    leaves: Tensors


def versions() -> dict[str, str | None]:
    """Return the version of each package that peers come from, None for what is not installed."""
    found: dict[str, str | None] = {"torch": torch.__version__}
    for distribution in ("triton", *PACKAGES.values(), "mmcv-lite"):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = None
    return found


def installed(peer: str) -> bool:
    """Tell whether the package of a peer can be imported."""
    module = {"liger": "liger_kernel"}.get(peer.split()[0], peer.split()[0].split(".")[0])
    return importlib.util.find_spec(module) is not None


def peers_of(problem: Problem, wanted: Sequence[str]) -> dict[str, Callable[[], Contender]]:
    """Return how to make each wanted and installed peer that serves the op at all; making it may fail."""
    op = problem.op.name
    makers: dict[str, Callable[[], Contender]] = {}
    eager = _eager(op)
    if eager is not None:
        makers["torch eager"] = lambda: _contender("torch eager", problem, eager, op in HALF_PARAMETERS)
        if problem.dtype.itemsize < 4 and op.startswith("group_norm"):
            makers["torch autocast"] = lambda: _contender("torch autocast", problem, _autocast(eager, problem), False)
        if op != "sync_batch_norm_relu":  # collectives
            makers["torch.compile"] = lambda: _contender(
                "torch.compile", problem, torch.compile(eager, dynamic=False), op in HALF_PARAMETERS
            )
    for name, make in (("timm", _timm), ("apex", _apex), ("liger", _liger), ("mmcv", _mmcv)):
        if op in SERVES[name]:
            makers[name] = lambda name=name, make=make: make(name, problem)
    if "timm" in makers and problem.op.role != "weights":
        makers["timm compiled"] = lambda: _compiled_timm(problem)
    return {name: makers[name] for name in PEERS if name in makers and name in wanted and installed(name)}


SERVES = {
    "timm": {
        "group_norm_relu",
        "batch_norm_relu",
        "evonorm_s0",
        "evonorm_b0",
        "filter_response_norm",
        "weight_standardize",
        "weight_standardize_many",
    },
    "apex": {"group_norm", "group_norm_relu", "group_norm_add_relu"},
    "liger": {"group_norm", "group_norm_relu", "group_norm_add_relu"},
    "mmcv": {"weight_standardize", "weight_standardize_many"},
}
# F.group_norm takes parameters of the input's dtype; F.batch_norm takes float32 ones with a half input.
HALF_PARAMETERS = {"group_norm", "group_norm_relu", "group_norm_add_relu"}


def _contender(name: str, problem: Problem, function: Function, half_parameters: bool) -> Contender:
    leaves = {}
    for key, t in problem.tensors.items():
        dtype = problem.dtype if half_parameters or t.ndim > 1 else t.dtype
        leaves[key] = t.detach().clone().to(dtype).requires_grad_()
    return Contender(name, lambda: function(**leaves), leaves)


# --- torch


def _eager(op: str) -> Function | None:
    """Return what the toolkits' blocks do, the sum and the ReLU in place; for the others the plain formula."""

    def group_norm(x, weight, bias, residual=None):
        z = F.group_norm(x, GROUPS, weight, bias, EPS)
        z = z if residual is None else z.add_(residual)
        return z if op == "group_norm" else z.relu_()

    def batch_norm(x, weight, bias, residual=None):
        z = F.batch_norm(x, None, None, weight, bias, True, 0.1, EPS)
        z = z if residual is None else z.add_(residual)
        return z.relu_()

    def sync_batch_norm(x, weight, bias):
        from torch.nn.modules._functions import SyncBatchNorm  # the module itself would see one rank and not sync

        group = torch.distributed.group.WORLD
        return SyncBatchNorm.apply(x, weight, bias, None, None, EPS, 0.1, group, 1).relu_()

    if op.startswith("group_norm"):
        return group_norm
    if op.startswith("batch_norm"):
        return batch_norm
    if op == "sync_batch_norm_relu":
        return sync_batch_norm
    return _plain(op)


def _plain(op: str) -> Function:
    from normplug.bench.cases import OPS

    def formula(**tensors):
        x = tensors.get("x")
        if x is not None:
            tensors = {k: t if t.ndim > 1 else t.to(x.dtype) for k, t in tensors.items()}
        return OPS[op].formula(**tensors)[0]

    return formula


def _autocast(eager: Function, problem: Problem) -> Function:
    def function(**tensors):
        # The convolution behind it casts back: the gradient of y comes in half precision too.
        with torch.autocast(tensors["x"].device.type, dtype=problem.dtype):
            return eager(**tensors).to(problem.dtype)

    return function


# --- other packages


def _timm(name: str, problem: Problem) -> Contender:
    if problem.op.role == "weights":
        return _contender(name, problem, _timm_filters, False)
    import timm.layers

    channels = problem.shape.dims[0][1]
    make = {
        "group_norm_relu": lambda: timm.layers.GroupNormAct(channels, GROUPS, EPS, act_layer=nn.ReLU),
        "batch_norm_relu": lambda: timm.layers.BatchNormAct2d(channels, EPS, act_layer=nn.ReLU),
        "evonorm_s0": lambda: timm.layers.EvoNorm2dS0(channels, groups=GROUPS, eps=EPS),
        "evonorm_b0": lambda: timm.layers.EvoNorm2dB0(channels, eps=EPS),
        "filter_response_norm": lambda: timm.layers.FilterResponseNormTlu2d(channels, eps=EPS),
    }
    device = problem.tensors["x"].device
    module = make[problem.op.name]().to(device).train()
    if problem.op.name in HALF_PARAMETERS:
        module = module.to(problem.dtype)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for key in problem.op.vectors:
            parameters[key].copy_(problem.tensors[key])
    x = problem.tensors["x"].detach().clone().requires_grad_()
    # timm's norms are 2-D: time and height of a clip become one axis, which copies nothing.
    planar = x.ndim == 5
    leaves = {"x": x, **{key: parameters[key] for key in problem.op.vectors}}

    def call():
        y = module(x.flatten(2, 3) if planar else x)
        return y.unflatten(2, x.shape[2:4]) if planar else y

    return Contender(name, call, leaves)


def _compiled_timm(problem: Problem) -> Contender:
    made = _timm("timm compiled", problem)
    return Contender(made.name, torch.compile(made.call, dynamic=False), made.leaves)


def _timm_filters(**weights):
    """StdConv2d's arithmetic: the population variance, and eps inside the root."""
    return [
        F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, eps=1e-6).view_as(w) for w in weights.values()
    ]


def _apex(name: str, problem: Problem) -> Contender:
    from apex.contrib.group_norm import GroupNorm

    x = problem.tensors["x"]
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last) or x.shape[1] < 128:
        raise ValueError("apex has kernels for 4-D channels-last inputs of 128 and more channels")
    module = GroupNorm(GROUPS, x.shape[1], EPS, device=x.device, dtype=torch.float32)
    return _with_sum_and_relu(name, problem, module, {"weight": module.weight, "bias": module.bias})


def _liger(name: str, problem: Problem) -> Contender:
    from liger_kernel.transformers.group_norm import LigerGroupNorm

    x = problem.tensors["x"]
    if not x.is_contiguous():
        raise ValueError("liger-kernel has kernels for contiguous inputs")
    module = LigerGroupNorm(x.shape[1], GROUPS, EPS).to(x.device, problem.dtype)
    # As (N, C, positions): not every version runs backward on more axes.
    return _with_sum_and_relu(
        name,
        problem,
        lambda x: module(x.flatten(2)).view_as(x),
        {"weight": module.weight, "bias": module.bias},
    )


def _with_sum_and_relu(name: str, problem: Problem, norm: Function, parameters: dict[str, nn.Parameter]) -> Contender:
    """Return the norm, the sum and the ReLU, both in place as in the toolkits' blocks if autograd allows it here.

    It does not where the norm's output is a view made inside of its function, or is needed by its backward.
    """
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(problem.tensors[key])
    big = {k: t.detach().clone().requires_grad_() for k, t in problem.tensors.items() if t.ndim > 1}

    def in_place():
        z = norm(big["x"])
        z = z.add_(big["residual"]) if "residual" in big else z
        return z if problem.op.name == "group_norm" else z.relu_()

    def copying():
        z = norm(big["x"])
        z = z + big["residual"] if "residual" in big else z
        return z if problem.op.name == "group_norm" else z.relu()

    leaves = {**big, **parameters}
    try:
        torch.autograd.grad(in_place(), list(leaves.values()), problem.dys[0])
    except RuntimeError:
        return Contender(name, copying, leaves)
    return Contender(name, in_place, leaves)


@functools.cache
def mmcv_standardize() -> Callable[[Tensor], Tensor]:
    """Return mmcv's own ``conv_ws_2d`` without the convolution at its end."""
    from types import FunctionType, SimpleNamespace

    from mmcv.cnn.bricks.conv_ws import conv_ws_2d

    # The same code with another F: its conv2d returns the weight it was to use.
    names = {**conv_ws_2d.__globals__, "F": SimpleNamespace(conv2d=lambda _x, weight, *_: weight)}
    function = FunctionType(conv_ws_2d.__code__, names, argdefs=conv_ws_2d.__defaults__)
    return lambda weight: function(None, weight, eps=EPS)


def _mmcv(name: str, problem: Problem) -> Contender:
    standardize = mmcv_standardize()
    return _contender(name, problem, lambda **weights: [standardize(w) for w in weights.values()], False)
