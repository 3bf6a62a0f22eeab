"""A stand-in for mmaction2's DRN localizer, whose folder is missing from the 1.2.0 wheel.

``mmaction.models`` imports it by name, so without it no model of mmaction2 can be imported.
"""

from mmaction.registry import MODELS
from torch import nn

__all__ = ["DRN"]


@MODELS.register_module()
class DRN(nn.Module):
    """Takes the name; building it says what is missing.

    Raises:
        NotImplementedError: Always.
    """

    def __init__(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "The config builds DRN, but the mmaction2 1.2.0 package on PyPI was published without the folder "
            "mmaction/models/localizers/drn. Install mmaction2 from a checkout instead: "
            "'git clone -b v1.2.0 https://github.com/open-mmlab/mmaction2' and 'pip install -e mmaction2'. "
            "(Not without -e: setuptools leaves the folder out again.) normplug then uses that DRN."
        )
