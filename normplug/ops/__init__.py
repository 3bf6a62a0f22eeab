"""Ops: functions with a schema, a plain-PyTorch reference and, where one exists, a kernel."""

from normplug.ops.group_norm import group_norm

__all__ = ["group_norm"]
