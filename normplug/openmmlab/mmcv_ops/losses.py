"""Focal losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from normplug.openmmlab.mmcv_ops._common import op, wide


def _class_weight(weight: Tensor, target: Tensor) -> Tensor | float:
    """The weight of each row's own class; 1 for background, where mmcv's kernel reads past the end."""
    if weight.numel() == 0:
        return 1.0
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, wide(weight)[target.clamp(0, len(weight) - 1)], 1.0)


def _balanced(loss: Tensor, positive: Tensor, weight: Tensor, target: Tensor, alpha: float) -> Tensor:
    """``loss`` (N, C) times alpha for the target class, 1 - alpha for the others, and the row's class weight."""
    row = _class_weight(weight, target)
    loss = loss * (row[:, None] if isinstance(row, Tensor) else row)
    return torch.where(positive, alpha * loss, (1 - alpha) * loss)


def _sigmoid_terms(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Each logit's probability of being right, its log, and which logits are positive. The log comes from the
    # logit: mmcv's kernel takes it of the rounded probability, which is 0 or 1 beyond logits of about 17.
    positive = torch.arange(input.shape[1], device=input.device) == target[:, None]
    right = torch.where(positive, wide(input), -wide(input))
    return right.sigmoid(), F.logsigmoid(right), positive


@op
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` (N, C) with -a (1 - p)^gamma log p, p each logit's probability of being right.

    a is ``alpha`` for the target class and 1 - ``alpha`` for the others; a target outside [0, C) is background.
    """
    p, log_p, positive = _sigmoid_terms(input, target)
    output.copy_(_balanced(-(1 - p).pow(gamma) * log_p, positive, weight, target, alpha))


@op
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` with the loss's gradient to the logits."""
    p, log_p, positive = _sigmoid_terms(input, target)
    slope = (1 - p).pow(gamma) * (gamma * p * log_p - (1 - p))
    slope = torch.where(positive, slope, -slope)  # a negative's p falls with its logit
    grad_input.copy_(_balanced(slope, positive, weight, target, alpha))


def _softmax_terms(softmax: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    softmax = wide(softmax)
    p = softmax.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return p, p.clamp(min=torch.finfo(p.dtype).tiny).log(), target >= 0


@op
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` (N,) with -alpha (1 - p)^gamma log p; ``input`` is the softmax, not the logits."""
    p, log_p, valid = _softmax_terms(input, target)
    loss = -alpha * (1 - p).pow(gamma) * log_p * _class_weight(weight, target)
    output.copy_(torch.where(valid, loss, 0.0))


@op
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fill ``grad_input`` with the gradient to the logits, ``buff`` with p times that to the target's p."""
    p, log_p, valid = _softmax_terms(input, target)
    rest = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)  # its power gamma - 1 must stay finite at p = 1
    slope = alpha * (gamma * rest.pow(gamma - 1) * p * log_p - (1 - p).pow(gamma))
    buff.copy_(torch.where(valid, slope * _class_weight(weight, target), 0.0))
    one_hot = torch.arange(input.shape[1], device=input.device) == target[:, None]
    grad_input.copy_(wide(buff)[:, None] * (one_hot.to(p.dtype) - wide(input)))
