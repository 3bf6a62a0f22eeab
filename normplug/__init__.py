"""normplug: normalization for small batches, one line of config away in OpenMMLab's toolkits.

Importing the package registers its layers with mmengine and closes the gaps between today's torch and the last
releases of the toolkits; it needs neither mmcv nor a toolkit.
"""

from normplug import layers, ops
from normplug._version import __version__
from normplug.openmmlab.replacement import replace_norm
from normplug.registry import register_all

__all__ = ["__version__", "layers", "ops", "register_all", "replace_norm"]

register_all()
