"""The activations that kernels apply, and their gradients; the names are those of ``normplug.ops._common``."""

import triton
import triton.language as tl

__all__ = ["activate", "activation_grad", "as_constant"]

# Activations that multiply what is negative, by the slope that a kernel takes as a number: one kernel for all of them.
_SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}


def as_constant(act: str | None) -> tuple[str, float]:
    """Return what kernels take for an activation: the constant ACT and the number slope."""
    return ("linear", _SLOPES[act]) if act in _SLOPES else (act, 1.0)


@triton.jit
def _times(z, slope):
    """Return z * slope, which is 0 for slope 0 even where z is infinite or NaN."""
    return tl.where(slope == 0.0, 0.0, z * slope)


@triton.jit
def activate(z, slope, ACT: tl.constexpr):
    """Return the activation of z, or z itself without one (slope 1); NaN stays NaN."""
    if ACT == "linear":
        z = tl.where(z < 0, _times(z, slope), z)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(False, "the kernels have no such activation")
    return z


@triton.jit
def activation_grad(dy, z, slope, ACT: tl.constexpr):
    """Return dy times the derivative of the activation at z."""
    if ACT == "linear":
        dy = tl.where(z <= 0, _times(dy, slope), dy)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        dy = dy * (cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
    else:
        tl.static_assert(False, "the kernels have no such activation")
    return dy
