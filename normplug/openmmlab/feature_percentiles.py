"""How the features before a norm spread while a model trains: figure 6 of the GroupNorm paper."""

import fnmatch
import math
from collections import defaultdict
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from normplug.layers._batch_statistics import recomputing

__all__ = ["FeaturePercentileHook"]

GOLDEN = (math.sqrt(5) - 1) / 2


@HOOKS.register_module()
class FeaturePercentileHook(Hook):
    """Records percentiles of the features that enter chosen norms, every few training iterations.

    They go to the visualizer as scalars ``features/<layer>/p<percentile>`` and, at the end of training, as curves
    into ``feature_percentiles.png`` beside the log. Features are those before the norm (and the ReLU) of the main
    process's batch. A layer called several times in an iteration counts with all calls; what activation checkpointing
    runs again does not count again. A resumed run goes on with the curves of the checkpoint.

    Of a map with more than ``max_values`` values that many are looked at, at fixed places: the fractional parts of
    k times the golden ratio, k = 1, 2, ..., scaled to the length of the map. They spread evenly over samples,
    channels and positions, depend on the shape only, and no random number is drawn.

    Switch on with ``custom_hooks = [dict(type="FeaturePercentileHook", layers="backbone.layer4.*.bn2")]``.

    Args:
        layers: Name pattern, or a list of such, of modules of the model: * and ? as in file names. Every module
            that matches counts, be it a norm or not.
        interval: Record every that many iterations, and in the first.
        percentiles: Which, from 0 to 100.
        max_values: Values per call that are looked at.

    Raises:
        ValueError: If a number is out of its range, or a pattern matches no module (when training starts).
    """

    KEY = "feature_percentiles"
    priority = "BELOW_NORMAL"

    def __init__(
        self,
        layers: str | list[str],
        interval: int = 50,
        percentiles: tuple[float, ...] = (1, 20, 80, 99),
        max_values: int = 65536,
    ) -> None:
        if interval < 1 or max_values < 1:
            raise ValueError(
                f"FeaturePercentileHook counts interval and max_values from 1, but got {interval} and {max_values}."
            )
        if not percentiles or not all(0 <= p <= 100 for p in percentiles):
            raise ValueError(f"FeaturePercentileHook takes percentiles from 0 to 100, but got {percentiles!r}.")
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        self.interval, self.percentiles, self.max_values = interval, tuple(percentiles), max_values
        self.history: dict[str, list[list[float]]] = defaultdict(list)  # per layer, rows of iteration and values
        self._modules: dict[str, nn.Module] = {}
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._handles: list = []

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        modules = dict(model.named_modules())
        for pattern in self.layers:
            found = fnmatch.filter([name for name in modules if name], pattern)
            if not found:
                norms = [name for name, module in modules.items() if "norm" in type(module).__name__.lower()]
                raise ValueError(
                    f"FeaturePercentileHook found no module called {pattern!r}. The model's norms are called "
                    f"{', '.join(norms[:8])}{', ...' if len(norms) > 8 else ''}: give one, or a pattern with *."
                )
            self._modules.update({name: modules[name] for name in found})

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if is_main_process() and (runner.iter == 0 or (runner.iter + 1) % self.interval == 0):
            self._handles = [
                module.register_forward_pre_hook(self._looker(name)) for name, module in self._modules.items()
            ]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        at = torch.tensor(self.percentiles, dtype=torch.float64) / 100
        step, scalars = runner.iter + 1, {}
        for name, values in self._values.items():
            row = torch.cat(values).double().cpu().quantile(at).tolist()
            self.history[name].append([step, *row])
            scalars |= {f"features/{name}/p{p:g}": v for p, v in zip(self.percentiles, row, strict=True)}
        self._values.clear()
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)

    def after_train(self, runner) -> None:
        if is_main_process() and self.history:
            path = Path(runner.log_dir, "feature_percentiles.png")
            plot(self.history, self.percentiles, path)
            print_log(f"FeaturePercentileHook: {path}", "current")

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if self.history:
            checkpoint[self.KEY] = dict(self.history)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if runner._resume:
            for name, rows in checkpoint.get(self.KEY, {}).items():
                if all(len(row) == 1 + len(self.percentiles) for row in rows):
                    self.history[name] = [list(row) for row in rows]

    def _looker(self, name: str):
        def look(module: nn.Module, args: tuple) -> None:
            if args[0].numel() and not recomputing():
                self._values[name].append(sample(args[0].detach(), self.max_values))

        return look


def sample(x: Tensor, count: int) -> Tensor:
    """Return ``count`` values of x, or all if there are no more, without copying x whatever its layout."""
    if x.numel() <= count:
        return x.flatten()
    k = torch.arange(1, count + 1, dtype=torch.float64, device=x.device)
    places = ((k * GOLDEN).frac() * x.numel()).long()
    index = []
    for size in reversed(x.shape):
        index.append(places % size)
        places = places // size
    return x[tuple(reversed(index))]


def plot(history: dict[str, list[list[float]]], percentiles: tuple[float, ...], path: Path) -> None:
    """Draw a panel per layer, a curve per percentile."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(history), 3)
    rows = -(-len(history) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(history) :]:
        panel.remove()
    for panel, (name, entries) in zip(axes.flat, history.items(), strict=False):
        steps, *curves = zip(*entries, strict=True)
        for percentile, curve in zip(percentiles, curves, strict=True):
            panel.plot(steps, curve, label=f"{percentile:g}%", marker="." if len(steps) < 3 else None)
        panel.set_title(name, fontsize="medium")
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
    axes.flat[0].set_ylabel("feature before the norm")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize="small")  # no curve behind
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
