"""Batch norms for torch's eager quantization, whose ``fuse_modules`` looks up what it fuses by class."""

import importlib

from torch import nn

__all__ = ["let_fuse"]


def let_fuse(norm: type[nn.Module]) -> None:
    """Have ``fuse_modules`` fold a batch norm in evaluation, and a ReLU behind it, into the convolution before it."""
    try:
        known = importlib.import_module("torch.ao.quantization.fuser_method_mappings")._DEFAULT_OP_LIST_TO_FUSER_METHOD
    except (ImportError, AttributeError):  # torch is about to move it to a package of its own
        return
    for conv, stock in ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)):
        for behind in ((), (nn.ReLU,)):
            known[(conv, norm, *behind)] = _unless_lost(known[(conv, stock, *behind)])


def _unless_lost(fuse):
    def fuse_ours(is_qat, conv, norm, *behind):
        if is_qat:
            raise ValueError(
                f"{norm} is no batch norm that torch can train in quantization. Fuse in evaluation (fuse_modules, not "
                f"fuse_modules_qat), or use nn.BatchNorm2d, whose state dict is the same, in the model."
            )
        if lost := norm.lost_in_fusion():
            raise ValueError(
                f"{norm} cannot be fused into the convolution before it, which would drop {lost}. Build it without, "
                f"and put an activation behind it as a module: ['conv', 'norm', 'relu'] can be fused."
            )
        return fuse(is_qat, conv, norm, *behind)

    return fuse_ours
