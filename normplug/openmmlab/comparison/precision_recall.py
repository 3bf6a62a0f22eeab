"""Precision by recall, the curve under which COCO's AP is the area."""

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from pycocotools.cocoeval import COCOeval

__all__ = ["draw_curves", "precision_recall"]


def precision_recall(evaluator: COCOeval) -> dict[str, list[float]]:
    """Return the precision at COCO's 101 recalls, the mean over classes with objects, of objects of all sizes.

    Args:
        evaluator: Evaluated; it is accumulated here.

    Returns:
        By name: "IoU 0.5" and "IoU 0.75" where the evaluator has these thresholds, and "mean" over all of them. The
        mean of each curve is AP50, AP75 and AP.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes), -1: no objects
    precision = precision[:, :, (precision > -1).any((0, 1))]
    if not precision.size:
        return {}
    curves = {}
    for threshold in (0.5, 0.75):
        at = np.flatnonzero(np.isclose(evaluator.params.iouThrs, threshold))
        if len(at):
            curves[f"IoU {threshold}"] = precision[at[0]].mean(1).tolist()
    return curves | {"mean": precision.mean((0, 2)).tolist()}


def draw_curves(curves: Sequence[Mapping[str, Sequence[float]]], letters: Sequence[str]) -> Figure:
    """Draw the curves of both models, a panel for each name; B is dashed, so that equal curves both show."""
    names = [name for name in curves[0] if name in curves[1]]
    figure = Figure(figsize=(3.7 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for curve, letter, style in zip(curves, letters, ("-", "--"), strict=True):
            axes.plot(np.linspace(0, 1, len(curve[name])), curve[name], style, label=letter)
        axes.set(title=name, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
