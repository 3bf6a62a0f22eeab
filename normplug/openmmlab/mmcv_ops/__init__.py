"""Stand-ins for the compiled functions of ``mmcv._ext`` 2.1.0, on torchvision's operators and plain ATen.

``mmcv.ops`` calls its C++ extension by fixed names, with output tensors that the extension fills. The functions
here keep those names, arguments and fill rules, so that ``mmcv.ops`` runs unchanged on ``mmcv-lite``, on CPU and
CUDA, with empty inputs too. ``OPS`` holds them; whatever else is asked for is a function that raises
``NotImplementedError`` when called, because ``mmcv.ops`` looks up every name while it is imported.

Values and gradients are mmcv's, at the borders of images too, where they are a convention: mmcv gives an offset no
gradient whose sample lies a whole pixel outside. What differs says so. Half precision is computed in float32 and
rounded once, on the way into the caller's output.
"""

from normplug.openmmlab.mmcv_ops import attention, boxes, convolution, losses, regions, rotated, video
from normplug.openmmlab.mmcv_ops._common import OPS, missing_op

__all__ = ["OPS", "attention", "boxes", "convolution", "losses", "missing_op", "regions", "rotated", "video"]
