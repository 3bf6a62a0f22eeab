"""The moving digits as an mmaction2 data set, made on first use."""

from typing import Any

from mmaction.datasets import VideoDataset
from mmaction.registry import DATASETS
from mmengine.logging import print_log

from normplug.openmmlab import digits

__all__ = ["DigitsVideo"]


@DATASETS.register_module()
class DigitsVideo(VideoDataset):
    """Clips of a moving digit; where ``data_root`` has none they are made first.

    Args:
        data_root: Folder of the digits sets; this one is its folder ``video``.
        seed: Seed the set is made with, and must have been made with. Default: see `digits.DEFAULTS`.
        num_train: Number of training clips, likewise.
        num_val: Number of validation clips, likewise.
        kwargs: What `VideoDataset` takes; ``ann_file`` is ``video/train.txt`` or ``video/val.txt``.

    Raises:
        ValueError: If ``data_root`` holds a set of another seed or size.
    """

    METAINFO = {"classes": digits.MOTIONS}  # noqa: RUF012 - mmengine's name and type

    def __init__(
        self,
        data_root: str = "data/digits",
        *,
        seed: int | None = None,
        num_train: int | None = None,
        num_val: int | None = None,
        **kwargs: Any,
    ) -> None:
        if digits.make("video", data_root, seed=seed, num_train=num_train, num_val=num_val):
            print_log(f"Made the digits video set in {data_root}/video", logger="current")
        super().__init__(data_root=data_root, **kwargs)
