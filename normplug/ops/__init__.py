"""Ops: functions with a schema, a plain-PyTorch reference and, where one exists, a kernel."""

from normplug.ops.batch_norm import batch_norm_act, batch_normalize
from normplug.ops.group_norm import group_norm

__all__ = ["batch_norm_act", "batch_normalize", "group_norm"]
