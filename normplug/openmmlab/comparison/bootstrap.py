"""Paired bootstrap over samples (images or clips): is a difference between two models larger than its noise?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Difference", "Metric", "compare", "draw"]

LEVEL = 0.95
FEWEST = 5  # samples that a verdict needs: resamples of fewer are too much alike to show the noise
CHUNK = 50  # resamples that are evaluated together: enough for numpy, little memory


class Metric(NamedTuple):
    """What a number is: ``AP`` of ``box``es, of one class or all, of objects of one size or all."""

    name: str
    of: str = ""
    size: str = "all"
    category: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.category, self.of, self.name, self.size if self.size != "all" else "")))


# How often each sample counts, (R, N), to the metrics' values, (R,) each; NaN where one is not defined.
Scorer = Callable[[np.ndarray], dict[Metric, np.ndarray]]


@dataclass(frozen=True)
class Difference:
    """A metric of both models, B - A, and the percentile interval of that."""

    metric: Metric
    a: float
    b: float
    low: float
    high: float
    support: int  # samples that have something to find

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """Which model is better, if the interval excludes zero and comes from samples enough."""
        if np.isnan(self.low):
            return "not defined"
        if self.support < FEWEST:
            return "too few samples"
        return "A is better" if self.high < 0 else "B is better" if self.low > 0 else "inside the noise"


def draw(samples: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Return how often each of N samples is drawn in R draws of N with replacement: (R, N)."""
    return np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), resamples).astype(np.int32)


def compare(
    a: Scorer,
    b: Scorer,
    samples: int,
    resamples: int = 1000,
    seed: int = 0,
    *,
    support: Mapping[Metric, int] | None = None,
    advance: Callable = lambda done: None,
) -> list[Difference]:
    """Compare two models by their values on the data and on resamples of it, the same for both.

    The interval is the central 95% of the resamples' differences. Resamples in which a metric is not defined (no
    object of that class) are left out of it.

    Args:
        a: Metrics of model A as a function of how often each sample counts.
        b: The same of B; what only one of the two has is left out.
        samples: Number of images or clips N.
        resamples: Number of resamples R.
        seed: Of the resamples.
        support: For each metric the number of samples that have something to find (by default all have): a class that
            is in one image has the same value in every resample, which says nothing of its noise.
        advance: Told how many resamples have been evaluated since it was last called.

    Returns:
        The metrics, in A's order.

    Raises:
        ValueError: If there is no sample or no resample.
    """
    if samples < 1 or resamples < 1:
        raise ValueError(
            f"A bootstrap needs samples and resamples, but got {samples} and {resamples}: test on a data set that is "
            f"not empty, with --resamples of 1 or more (1000 gives steady intervals)."
        )
    all_once = np.ones((1, samples), np.int32)
    values_a, values_b = a(all_once), b(all_once)
    metrics = [metric for metric in values_a if metric in values_b]
    support = support or {}
    changes: dict[Metric, list[np.ndarray]] = {metric: [] for metric in metrics}
    for counts in np.array_split(draw(samples, resamples, seed), -(-resamples // CHUNK)):
        ours, theirs = a(counts), b(counts)
        for metric in metrics:
            changes[metric].append(theirs[metric] - ours[metric])
        advance(len(counts))
    return [
        Difference(
            metric,
            values_a[metric].item(),
            values_b[metric].item(),
            *_interval(np.concatenate(changes[metric])),
            support.get(metric, samples),
        )
        for metric in metrics
    ]


def _interval(changes: np.ndarray) -> tuple[float, float]:
    defined = changes[~np.isnan(changes)]
    if not len(defined):
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return low.item(), high.item()
