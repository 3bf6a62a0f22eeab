"""The activations that kernels apply, and their gradients; the names are those of ``normplug.ops._common``."""

import triton
import triton.language as tl

__all__ = ["activate", "activation_grad"]


@triton.jit
def activate(z, ACT: tl.constexpr):
    """Return the activation of z, or z itself without one; NaN stays NaN."""
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACT == "leaky_relu":
        z = tl.where(z < 0, 0.01 * z, z)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(ACT is None, "the kernels have no such activation")
    return z


@triton.jit
def activation_grad(dy, z, ACT: tl.constexpr):
    """Return dy times the derivative of the activation at z."""
    if ACT == "relu":
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACT == "leaky_relu":
        dy = tl.where(z <= 0, 0.01 * dy, dy)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        dy = dy * (cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
    else:
        tl.static_assert(ACT is None, "the kernels have no such activation")
    return dy
