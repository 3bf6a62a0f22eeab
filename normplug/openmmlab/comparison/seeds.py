"""Several trainings of each model: is a difference larger than the noise of training?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from normplug.openmmlab.comparison.bootstrap import LEVEL, Metric

__all__ = ["OverSeeds", "over_seeds"]


@dataclass(frozen=True)
class OverSeeds:
    """A metric of each seed of both models: means, B - A of these, and Welch's t interval of that.

    The interval takes the seeds of each side for a sample of all trainings that one could have made, with a variance
    of its own. All were scored on the same test data, whose noise is shared by both sides and not in it.
    """

    metric: Metric
    a: list[float]
    b: list[float]

    @property
    def means(self) -> tuple[float, float]:
        """Of A and B."""
        return float(np.mean(self.a)), float(np.mean(self.b))

    @property
    def deviations(self) -> tuple[float, float]:
        """Standard deviations of A and B, n - 1 in the divisor; NaN of a single seed."""
        of_a, of_b = (float(np.std(x, ddof=1)) if len(x) > 1 else np.nan for x in (self.a, self.b))
        return of_a, of_b

    @property
    def difference(self) -> float:
        """Mean of B minus mean of A."""
        return self.means[1] - self.means[0]

    @property
    def interval(self) -> tuple[float, float]:
        """Welch's 95% interval of the difference.

        NaN where there is none: with fewer than two seeds on a side, or where the seeds of neither differ.
        """
        if min(len(self.a), len(self.b)) < 2 or not self._spread:
            return np.nan, np.nan
        parts = [s**2 / len(x) for s, x in zip(self.deviations, (self.a, self.b), strict=True)]  # of the variance
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(self.a) - 1) + parts[1] ** 2 / (len(self.b) - 1))
        half = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(sum(parts)))
        return self.difference - half, self.difference + half

    @property
    def verdict(self) -> str:
        """Which model is better, if the interval excludes zero."""
        low, high = self.interval
        if np.isnan(self.difference):
            return "not defined"
        if min(len(self.a), len(self.b)) < 2:
            return "too few seeds"
        if np.isnan(low):  # all equal on both sides: of a saturated or coarse metric, which shows no noise to judge by
            return "no spread"
        return "A is better" if high < 0 else "B is better" if low > 0 else "inside the noise"

    @property
    def _spread(self) -> bool:
        return any(np.ptp(x) > 0 for x in (self.a, self.b))


def over_seeds(a: Sequence[Mapping[Metric, float]], b: Sequence[Mapping[Metric, float]]) -> list[OverSeeds]:
    """Return the metrics over the seeds of A and B, each with the same metrics, in the order of A's first."""
    return [OverSeeds(metric, [seed[metric] for seed in a], [seed[metric] for seed in b]) for metric in a[0]]
