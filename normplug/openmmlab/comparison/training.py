"""How two checkpoints were trained, from the logs that lie beside them."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from normplug.openmmlab.training_runs import TASKS, Outcome, read_scalars

__all__ = ["draw_trainings", "find_training"]

WINDOW = 50  # points of a loss curve that a smoothed one has at the most


def find_training(checkpoint: Path, task: str) -> Outcome | None:
    """Return what mmengine logged beside a checkpoint, in ``*/vis_data/scalars.json``; None if there is nothing.

    Args:
        checkpoint: In the work dir of its training.
        task: detection or video.
    """
    try:
        return read_scalars(checkpoint.resolve().parent, task)
    except (OSError, RuntimeError):
        return None  # a checkpoint that was moved, or the end of a training that logged no evaluation


def draw_trainings(trainings: dict[str, Outcome], task: str, colours: dict[str, str], marks: dict[str, str]) -> Figure:
    """Draw loss and metrics of trainings over each other, the first one on top, with a broken line and hollow marks.

    Args:
        trainings: What was logged, by the name that the legend gives.
        task: detection or video.
        colours: By the same names.
        marks: By the same names, matplotlib's.
    """
    columns = TASKS[task]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 1 + len(columns))
    for i, (name, outcome) in enumerate(trainings.items()):
        line = {"color": colours[name], "linestyle": "-" if i else "--", "zorder": 3 - i}
        steps, losses = np.array(outcome.losses).reshape(-1, 2).T
        panels[0].plot(steps, losses, **line | {"alpha": 0.25, "linewidth": 0.8})
        panels[0].plot(*_smoothed(steps, losses), **line, label=name)
        for axes, (key, _) in zip(panels[1:], columns, strict=True):
            epochs = [epoch for epoch, _ in outcome.evaluations]
            values = [100 * metrics[key] for _, metrics in outcome.evaluations]
            fill = {"markerfacecolor": "none"} if i == 0 else {}
            axes.plot(epochs, values, marker=marks[name], **line, **fill)
    panels[0].set(title="training loss", xlabel="iteration")
    for axes, (_, name) in zip(panels[1:], columns, strict=True):
        axes.set(title=f"{name} (%)", xlabel="epoch")
        axes.margins(0.1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if all(len(outcome.evaluations) == 1 for outcome in trainings.values()):  # no curve: points above their epoch
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend()
    return figure


def _smoothed(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbouring points, at most WINDOW of them."""
    size = max(1, len(losses) // WINDOW)
    whole = len(losses) // size * size
    return steps[:whole].reshape(-1, size).mean(1), losses[:whole].reshape(-1, size).mean(1)
