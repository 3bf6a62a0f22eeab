"""Accuracy of a classifier as a function of how often each clip counts."""

from collections.abc import Sequence

import numpy as np

from normplug.openmmlab.comparison.bootstrap import Metric

__all__ = ["Accuracy"]


class Accuracy:
    """Top-k, mean class accuracy and that of each class, for weighted clips: a ``Scorer``.

    With each clip counting once, the first are those of mmaction2's ``AccMetric``: its mean over classes runs over
    those that some clip belongs to or was taken for.

    `support` has the number of clips of each class.

    Args:
        scores: Per clip and class, (N, K).
        labels: The right classes, (N,).
        top_k: Which k.
        classes: Names of the classes; by default their numbers.
    """

    def __init__(
        self, scores: np.ndarray, labels: np.ndarray, top_k: Sequence[int] = (1, 5), classes: Sequence[str] = ()
    ) -> None:
        ranked = np.argsort(scores, axis=1)[:, ::-1]
        self.hits = {k: (ranked[:, :k] == labels[:, None]).any(1) for k in top_k}
        members = np.eye(scores.shape[1])  # floats: numpy has no fast product of integers
        self.labels, self.taken_for = members[labels], members[ranked[:, 0]]
        self.classes = classes or [f"class {i}" for i in range(scores.shape[1])]
        clips = self.labels.sum(0).astype(int).tolist()
        self.support = {Metric("accuracy", category=name): n for name, n in zip(self.classes, clips, strict=True)}

    def __call__(self, counts: np.ndarray) -> dict[Metric, np.ndarray]:
        counts = counts.astype(np.float64)
        total = counts.sum(1)
        values = {Metric(f"top-{k}"): counts @ hits / total for k, hits in self.hits.items()}
        clips, taken = counts @ self.labels, counts @ self.taken_for
        right = counts @ (self.labels * self.taken_for)
        share = right / np.maximum(clips, 1)
        values[Metric("mean class accuracy")] = share.sum(1) / np.count_nonzero(clips + taken, axis=1)
        for k, name in enumerate(self.classes):
            values[Metric("accuracy", category=name)] = np.where(clips[:, k], share[:, k], np.nan)
        return values
