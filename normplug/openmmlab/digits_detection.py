"""The digits as an mmdet data set, made on first use."""

from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.logging import print_log

from normplug.openmmlab import digits

__all__ = ["DigitsDetection"]


@DATASETS.register_module()
class DigitsDetection(CocoDataset):
    """Images with handwritten digits; where ``data_root`` has none they are made first.

    Args:
        data_root: Folder of the digits sets; this one is its folder ``detection``.
        seed: Seed the set is made with, and must have been made with. Default: see `digits.DEFAULTS`.
        num_train: Number of training images, likewise.
        num_val: Number of validation images, likewise.
        kwargs: What `CocoDataset` takes; ``ann_file`` is ``detection/train.json`` or ``detection/val.json``.

    Raises:
        ValueError: If ``data_root`` holds a set of another seed or size.
    """

    METAINFO = {  # noqa: RUF012 - mmengine's name and type
        "classes": digits.CLASSES,
        "palette": [(int(25 * i), int(255 - 25 * i), int(97 * i % 256)) for i in range(10)],
    }

    def __init__(
        self,
        data_root: str = "data/digits",
        *,
        seed: int | None = None,
        num_train: int | None = None,
        num_val: int | None = None,
        **kwargs: Any,
    ) -> None:
        if digits.make("detection", data_root, seed=seed, num_train=num_train, num_val=num_val):
            print_log(f"Made the digits detection set in {data_root}/detection", logger="current")
        super().__init__(data_root=data_root, **kwargs)
