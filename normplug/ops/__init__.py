"""Ops: functions with a schema, a plain-PyTorch reference and, where one exists, a kernel."""

from normplug.ops.batch_norm import batch_norm_act, batch_normalize
from normplug.ops.evonorm_b0 import evonorm_b0
from normplug.ops.evonorm_s0 import evonorm_s0
from normplug.ops.filter_response_norm import filter_response_norm
from normplug.ops.group_norm import group_norm
from normplug.ops.weight_standardize import weight_standardize, weight_standardize_many

__all__ = [
    "batch_norm_act",
    "batch_normalize",
    "evonorm_b0",
    "evonorm_s0",
    "filter_response_norm",
    "group_norm",
    "weight_standardize",
    "weight_standardize_many",
]
