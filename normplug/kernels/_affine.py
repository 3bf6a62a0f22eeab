"""The formula of group and batch normalization: y = act(x̂ * weight + bias + residual), x̂ = (x - mean) * rstd."""

import triton
import triton.language as tl

from normplug.kernels._activations import activate, activation_grad
from normplug.kernels._tiles import Formula

__all__ = ["AFFINE"]


@triton.jit
def _value(x, mean, rstd, weight, bias, _v, _u, residual, slope, ACT: tl.constexpr):
    return activate((x - mean) * rstd * weight + bias + residual, slope, ACT)


@triton.jit
def _grads(dy, x, mean, rstd, weight, bias, _v, _u, residual, slope, ACT: tl.constexpr):
    x_hat = (x - mean) * rstd
    if ACT == "relu_of_output":  # then the output is in the residual's place
        dz = activation_grad(dy, residual, 0.0, "linear")
    else:
        dz = activation_grad(dy, x_hat * weight + bias + residual, slope, ACT)
    return rstd * (weight * dz), dz, dz * x_hat, 0.0, 0.0, 0.0


AFFINE = Formula(_value, _grads)
