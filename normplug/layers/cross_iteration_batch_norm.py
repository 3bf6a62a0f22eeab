"""CrossIterationBatchNorm: batch normalization over the batches of several iterations."""

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from normplug.layers import _convolution_trace as trace
from normplug.layers import _scripted as scripted
from normplug.layers._batch_statistics import (
    ConversionGuard,
    normalize_by_running,
    recomputing,
    update_running,
    values_per_channel,
)
from normplug.layers._checks import check_channels, check_has_statistics, checked
from normplug.layers._convolution_padding import gives_size, padding_of
from normplug.layers._symbolic import chosen, node_of
from normplug.ops.batch_norm import batch_norm_act, batch_norm_stats, batch_normalize
from normplug.ops.patch_statistics import filter_products, patch_statistics

__all__ = ["CrossIterationBatchNorm"]

EPS_MODES = ("inside", "outside")
RULES = ("drop", "max")


class Entry(NamedTuple):
    """Statistics of one earlier batch, and what it takes to carry them over to other filters.

    They are never written to: state dicts and copies may share them.
    """

    mean: Tensor  # (C,)
    var: Tensor  # (C,), population
    mean_grad: Tensor  # (groups, C_in / groups, *kernel): d mean / d filter
    var_grad: Tensor  # (C, C_in / groups, *kernel): d var / d filter
    mean_product: Tensor  # (C,): mean_grad times the filters of then
    var_product: Tensor  # (C,)


class _Statistics(NamedTuple):
    """What a batch was normalized with."""

    mean: Tensor
    rstd: Tensor
    mean_share: Tensor
    var_share: Tensor


class _Iteration:
    """The calls of a layer since the optimizer's last step: for itself alone, and new in every copy of the layer."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: tuple[Tensor, _Statistics] | None = None  # the mean of the last call's batch, and what it used
        self.versions: dict[int, tuple[int, ...]] = {}  # of the convolutions seen
        self.with_graph = True
        self.over = False  # a backward pass has gone through
        self.first_graph: weakref.ref | None = None

    def has_ended(self, conv: trace.Convolution | None, with_graph: bool) -> bool:
        return (
            self.over
            or self.with_graph != with_graph
            or (conv is not None and self.versions.get(id(conv.module), conv.version) != conv.version)
            or (self.first_graph is not None and self.first_graph() is None)  # no backward pass can come any more
        )

    def enter(self, conv: trace.Convolution | None, with_graph: bool) -> int:
        """Count a call and return its number, from 0."""
        self.with_graph = with_graph
        if conv is not None:
            self.versions[id(conv.module)] = conv.version
        self.calls += 1
        return self.calls - 1

    def watch(self, y: Tensor) -> None:
        """Notice the backward pass through y, or that there will be none because nobody needs y any more."""
        watcher = _Watcher(self)
        y.register_hook(watcher)  # the graph of y owns the watcher
        if self.first_graph is None:
            self.first_graph = weakref.ref(watcher)

    def __deepcopy__(self, memo: dict) -> "_Iteration":
        return _Iteration()

    def __reduce__(self) -> tuple:
        return _Iteration, ()


class _Watcher:
    def __init__(self, iteration: _Iteration) -> None:
        self.iteration = iteration

    def __call__(self, _grad: Tensor) -> None:
        self.iteration.over = True


class CrossIterationBatchNorm(ConversionGuard, _BatchNorm):
    """Batch normalization over this batch and the last ``buffer_num`` ones, optionally followed by an activation.

    The statistics of earlier batches belong to earlier weights. They are carried over to the present ones to first
    order in the filters of the convolution before this layer, and count as constants in the gradient. Works
    directly behind a Conv1d, Conv2d or Conv3d (any groups, stride, dilation and padding, also in a forward of its own;
    ConvWS too), which it finds by itself: a bare ``norm_cfg=dict(type='CBN')`` is enough. Where that convolution is
    frozen it is BN.

    Training costs one weight gradient of the convolution more per call, and holds about ``buffer_num`` float32
    copies of its weight. Evaluation is batch normalization by running statistics, and these are those of BN.

    - A layer called several times per iteration (a head shared over pyramid levels) keeps one history per call.
    - Activation checkpointing, reentrant or not, changes nothing, but not together with several calls.
    - Gradient accumulation enlarges the batch further: the statistics of the micro-batches are exact.
    - The history is part of the state dict, so a resumed run goes on as if it had not stopped. Checkpoints without
      one (of BN and others) load too. In a BN layer ``cbn_calls`` and ``history.*`` of ours are unexpected keys.
    - After a jump of the weights that is no training step, call ``reset_history()``.
    - torch.compile works, with a break of the graph at the convolution and at this layer in training. In training
      the layer cannot be part of a captured CUDA graph, and says so.
    - Statistics are those of one process; DistributedDataParallel saves the history of rank 0.

    Args:
        num_features: Number of channels C.
        buffer_num: Number of earlier batches; 0 is batch normalization.
        burnin: Number of first training iterations that are batch normalization and are not remembered.
        rho: Strength of the correction: 1 is the paper, 0 averages the statistics as they were.
        eps: Added to the variance or, with eps_mode 'outside', to its root.
        momentum: Weight of this batch in the running statistics; None for the mean over all batches.
        affine: Learn weight and bias per channel.
        track_running_stats: Keep running statistics (of single batches, the unbiased variance) for evaluation.
        eps_mode: 'inside' the root, as BN and the paper; 'outside' for the authors' published detectors.
        rule: What to do where a correction makes a variance negative: 'drop' that batch for that channel (authors'
            code) or take the 'max' with zero (paper).
        act: Activation applied in the same op: 'relu', 'leaky_relu', 'silu', 'gelu' or None. It is lost if the
            layer is folded into a convolution (mmcv's ``fuse_conv_bn``): leave it None where that is wanted.
        official_burnin_var: During burn-in divide by the unbiased standard deviation, as the authors' code does.
        skip_nonfinite: Leave the running statistics as they are where a batch would make one of them NaN or infinite,
            which nothing could undo. The output is that of the batch all the same.
        bias: With affine, learn the bias.

    Shape:
        - Input: (N, C, *), one to three spatial axes; N = 0 is fine.
        - Output: shape, dtype and memory format of the input.

    Raises:
        ValueError: If an argument is out of its range or axis 1 of the input is not C long. In training also if the
            input is not the output of a convolution, if there is a single value per channel, and if a checkpointed
            region calls the layer several times per iteration.
        RuntimeError: If a CUDA graph is captured in training.

    Reference:
        Z. Yao et al., "Cross-Iteration Batch Normalization", CVPR 2021, arXiv 2002.05712, eq. 7 to 12. Unlike the
        authors' code we normalize with the population variance throughout, put eps inside the root, never drop
        the current batch, and keep no old weights: the product of a derivative and the old filters is all that
        the correction needs of them.
    """

    _abbr_ = "bn"  # the attribute's name in a backbone (bn1): part of every published checkpoint
    _name_ = "CBN"
    family = "batch"
    op = "batch_norm"
    batch_statistics = True

    @checked
    def __init__(
        self,
        num_features: int,
        buffer_num: int = 3,
        burnin: int = 0,
        rho: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        eps_mode: str = "inside",
        rule: str = "drop",
        act: str | None = None,
        official_burnin_var: bool = False,
        skip_nonfinite: bool = False,
        *,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        for name, value, known in (("eps_mode", eps_mode, EPS_MODES), ("rule", rule, RULES)):
            if value not in known:
                raise ValueError(f"CBN knows {name} {known[0]!r} and {known[1]!r}, but got {value!r}.")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # not handed up: older torch does not know the argument
            self.register_parameter("bias", None)
        self.buffer_num, self.burnin, self.rho = buffer_num, burnin, rho
        self.eps_mode, self.rule, self.act = eps_mode, rule, act
        self.official_burnin_var, self.skip_nonfinite = official_burnin_var, skip_nonfinite
        self.cbn_calls = 0  # training iterations; not a tensor, so that no device has to be asked
        self._verified = False
        self._paddings: dict[tuple[torch.Size, torch.Size], dict[str, Any]] = {}  # by sizes of input and output
        self._history: dict[int, tuple[Entry, ...]] = {}  # newest first, by the number of the call in its iteration
        self._iteration = _Iteration()
        trace.follow(self)

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        if torch.jit.is_scripting():
            assert not self.training, "CBN is trained in Python alone: call eval() before what TorchScript made of it"
            var, eps = scripted.inside_root(self.running_var, self.eps, self.eps_mode, x)
            own = self.weight, self.bias, self.momentum, eps, self.act
            return scripted.batch_norm(x, self.running_mean, var, None, *own, False, act, residual)
        else:
            return self._forward(x, residual, act)

    def _forward(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        if (node := node_of(self, x, residual, act)) is not None:
            return node
        check_channels(self, x, self.num_features)
        act = self.act if act is None else chosen(act, self.act)
        if not self.training and self.running_mean is not None:
            args = x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            return normalize_by_running(*args, act, residual, self.eps_mode == "outside")
        if not self.training or x.numel() == 0:
            check_has_statistics(self, x, values_per_channel(x))
            trace.forget(x)
            return batch_norm_act(x, self.weight, self.bias, self.eps, act, residual)[0]
        return trace.eagerly(self._train, x, residual, act)  # it follows calls and backward passes in Python

    def _train(self, x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self} cannot be captured in a CUDA graph while it trains: replays would meet the same earlier "
                f"batches again and again. Leave it out of the captured part, or use BN there."
            )
        if torch.jit.is_tracing():
            warnings.warn(
                f"{type(self).__name__} is trained in Python alone: what torch.jit.trace makes of it has no history of "
                f"batches. Call eval() before.",
                torch.jit.TracerWarning,
                stacklevel=2,
            )
        with_graph = torch.is_grad_enabled()
        device = "cpu" if x.is_meta else x.device.type  # autocast knows no device "meta"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if recomputing() and self._iteration.calls:  # activation checkpointing runs this forward again
                again, statistics = True, self._statistics_of_first_pass(x)
            else:
                again, statistics = False, self._new_statistics(x, with_graph)
        y = self._normalize(x, statistics, residual, act)
        if y.requires_grad and not again:
            self._iteration.watch(y)
        return y

    def _normalize(self, x: Tensor, statistics: _Statistics, residual: Tensor | None, act: str | None) -> Tensor:
        mean, rstd, *shares = statistics
        return batch_normalize(x, mean, rstd, self.weight, self.bias, act, residual, *shares)

    # --- statistics

    def _new_statistics(self, x: Tensor, with_graph: bool) -> _Statistics:
        """Take the statistics of a batch, join them with those of earlier ones, and remember it."""
        count = values_per_channel(x)
        check_has_statistics(self, x, count)
        conv = trace.take(self, x) if self.buffer_num else None
        mean, m2 = batch_norm_stats(x)
        update_running(self, mean, m2 / (count - 1))
        if self._iteration.has_ended(conv, with_graph):
            self._iteration = _Iteration()
        call = self._iteration.enter(conv, with_graph)
        self.cbn_calls += call == 0
        burning_in = self.cbn_calls <= self.burnin
        if conv is None or not conv.trainable:
            statistics = self._statistics(mean, m2, count, burning_in)
        else:
            geometry = self._geometry(conv, x)
            if burning_in:
                statistics = self._statistics(mean, m2, count, burning_in)
            else:
                filters, var = conv.filters(), m2 / count
                statistics = self._joined_statistics(mean, var, count, call, filters)
                # Without a graph only the first call is remembered: who collects statistics calls on and on.
                if call == 0 or with_graph:
                    assert conv.input is not None
                    grads = patch_statistics(conv.input.detach(), x.detach(), mean, **geometry)
                    products = (p[0] for p in filter_products(filters, grads[:1], grads[1:]))
                    kept = (Entry(mean, var, *grads, *products), *self._history.get(call, ()))[: self.buffer_num]
                    self._history = {**self._history, call: kept}
        self._iteration.last = mean, statistics
        return statistics

    def _statistics_of_first_pass(self, x: Tensor) -> _Statistics:
        """Return what the same batch was normalized with before its activations were thrown away."""
        trace.forget(x)
        self._iteration.over = True
        assert self._iteration.last is not None
        mean, statistics = self._iteration.last
        if self._iteration.calls > 1 and not torch.equal(batch_norm_stats(x)[0], mean):
            raise ValueError(
                f"{self} was called {self._iteration.calls} times before a backward pass with activation "
                f"checkpointing, and cannot tell which of these calls is being recomputed. Switch checkpointing off "
                f"(with_cp=False) for the part that calls it several times, or run backward after each call."
            )
        return statistics

    def _statistics(self, mean: Tensor, m2: Tensor, count: int, burning_in: bool) -> _Statistics:
        """Return the statistics of this batch alone."""
        freedom = count - 1 if burning_in and self.official_burnin_var else count
        ones = torch.ones_like(mean)
        return self._scaled(mean, m2 / freedom, ones / count, ones / freedom)

    def _joined_statistics(self, mean: Tensor, var: Tensor, count: int, call: int, filters: Tensor) -> _Statistics:
        """Return the statistics of this batch and the remembered ones, each as if it had met the present filters."""
        means, variances = mean.unsqueeze(0), var.unsqueeze(0)
        entries = [e for e in self._history.get(call, ()) if e.var_grad.shape == filters.shape]
        if entries:
            then = [torch.stack(values).to(mean) for values in zip(*(e[:2] + e[4:] for e in entries), strict=True)]
            now = filter_products(filters, [e.mean_grad for e in entries], [e.var_grad for e in entries])
            by_mean, by_var = (self.rho * (n.to(mean) - t) for n, t in zip(now, then[2:], strict=True))
            means = torch.cat([means, then[0] + by_mean])
            variances = torch.cat([variances, then[1] + by_var - by_mean.square()])
        keep = variances >= 0 if self.rule == "drop" else torch.ones_like(variances, dtype=torch.bool)
        keep[0] = True
        kept = keep.sum(0)
        nothing = means.new_zeros(())
        centre = torch.where(keep, means, nothing).sum(0) / kept
        spread = variances.clamp(min=0) + (means - centre).square()
        share = 1 / (kept * count).to(mean.dtype)
        return self._scaled(centre, torch.where(keep, spread, nothing).sum(0) / kept, share, share)

    def _scaled(self, mean: Tensor, var: Tensor, mean_share: Tensor, var_share: Tensor) -> _Statistics:
        if self.eps_mode == "inside":
            return _Statistics(mean, (var + self.eps).rsqrt(), mean_share, var_share)
        root = var.sqrt()
        # The root has no derivative at 0: a constant channel gets the gradient of constant statistics.
        slope = torch.where(root > 0, (root + self.eps) / root, torch.zeros_like(root))
        return _Statistics(mean, 1 / (root + self.eps), mean_share, var_share * slope)

    def _geometry(self, conv: trace.Convolution, x: Tensor) -> dict[str, Any]:
        """Return how the convolution goes over its input: found out at the first batch, or by sizes if it pads itself.

        Raises:
            ValueError: If x (N, C, *) is not what its filters make of its input.
        """
        assert conv.input is not None
        own, sizes = conv.geometry, (conv.input.shape[2:], x.shape[2:])
        if x.is_meta or (self._verified and gives_size(own, *sizes)):  # of a meta tensor nothing can be asked
            return own
        if sizes not in self._paddings:
            found = padding_of(conv, x)
            if found is None and not x.isfinite().all():
                return own  # NaN says nothing about the convolution
            if found is None:
                raise ValueError(
                    f"{type(self).__name__} follows {conv.module} ({type(conv.module).__module__}), but its output is "
                    f"not the convolution of its input with its weight. A convolution that transforms its weight must "
                    f"offer it as standardized_weight(), as ConvWS does; otherwise use another norm here, for example "
                    f"GN or BN."
                )
            self._paddings[sizes] = found
            self._verified |= found == own
        return self._paddings[sizes]

    def reset_history(self) -> None:
        """Forget all earlier batches: to be called when the weights jump other than by training."""
        self._history = {}
        self._iteration = _Iteration()

    # --- modes, devices, copies and checkpoints

    def train(self, mode: bool = True) -> "CrossIterationBatchNorm":
        if mode != self.training:
            self._iteration = _Iteration()
        (trace.follow if mode else trace.leave)(self)
        return super().train(mode)

    def lost_in_fusion(self) -> str:
        return super().lost_in_fusion() or ("its eps outside of the root" if self.eps_mode == "outside" else "")

    def lost_in_conversion(self) -> str:
        # In evaluation it is a batch norm, and nothing is lost.
        return "the statistics of earlier iterations" if self.training else ""

    def _apply(self, fn, recurse: bool = True) -> "CrossIterationBatchNorm":
        super()._apply(fn, recurse)
        self._history = {
            call: tuple(Entry(*(_moved(fn, t) for t in entry)) for entry in entries)
            for call, entries in self._history.items()
        }
        self._iteration = _Iteration()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.training:
            trace.follow(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}cbn_calls"] = torch.tensor(self.cbn_calls)
        for call, entries in self._history.items():
            for age, entry in enumerate(entries):
                for name, value in entry._asdict().items():
                    destination[f"{prefix}history.{call}.{age}.{name}"] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if own:  # a state dict of other parts of the model leaves everything as it is
            calls = own.pop(f"{prefix}cbn_calls", 0)
            history = {key[len(prefix) :]: own.pop(key) for key in list(own) if key.startswith(f"{prefix}history.")}
            if self.num_batches_tracked is not None:  # the authors' layer has none
                own.setdefault(f"{prefix}num_batches_tracked", self.num_batches_tracked)
            try:
                self._history = self._read_history(history)
                self.cbn_calls = int(calls)
            except ValueError as error:
                error_msgs.append(f"history of {prefix.rstrip('.') or 'CBN'}: {error}")
            self._iteration = _Iteration()
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _read_history(self, values: dict[str, Tensor]) -> dict[int, tuple[Entry, ...]]:
        fields: dict[tuple[int, int], dict[str, Tensor]] = {}
        for key, value in values.items():
            _, at_call, at_age, name = key.split(".")
            fields.setdefault((int(at_call), int(at_age)), {})[name] = value
        read: dict[int, tuple[Entry, ...]] = {}
        for (call, age), entry in sorted(fields.items(), key=lambda item: item[0]):
            if set(entry) != set(Entry._fields) or age != len(read.get(call, ())):
                raise ValueError(
                    f"batch {age} of call {call} is incomplete: expected {list(Entry._fields)} from batch 0 on, but "
                    f"got {sorted(entry)}. Take the keys under 'history' out of the checkpoint to start without them."
                )
            sizes = {entry[name].shape[0] for name in Entry._fields if name != "mean_grad"}
            if sizes != {self.num_features}:
                raise ValueError(f"it is of {sorted(sizes)} channels, but this layer has {self.num_features}.")
            here = self.running_mean if self.running_mean is not None else self.weight
            device = entry["mean"].device if here is None else here.device
            copied = Entry(**{name: value.detach().clone().to(device) for name, value in entry.items()})
            read[call] = (*read.get(call, ()), copied)
        return {call: entries[: self.buffer_num] for call, entries in read.items()}

    def extra_repr(self) -> str:
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, default in (
                ("rho", 1.0),
                ("eps_mode", "inside"),
                ("rule", "drop"),
                ("act", None),
                ("official_burnin_var", False),
                ("skip_nonfinite", False),
            )
            if getattr(self, name) != default
        ]
        return ", ".join([super().extra_repr(), f"buffer_num={self.buffer_num}, burnin={self.burnin}", *changed])


def _moved(fn, t: Tensor) -> Tensor:
    """Apply .to(), .cuda(), .double() ... to a statistic; .half() moves it without rounding it."""
    moved = fn(t)
    return t.to(moved.device) if moved.element_size() < 4 else moved
