"""Normalize the last sample of a batch of more than 2**31 values in Triton's interpreter, without its memory or time.

Of every launch the first and the last programs alone run, and memory that nobody touches is none. A process of its own:
an offset that does not fit into 32 bits points anywhere, and the process ends by SIGSEGV.

    TRITON_INTERPRET=1 python far_offsets.py
"""

import importlib

import torch
from triton.runtime import interpreter

from normplug.kernels import _launch, _passes

POSITIONS = 4096
SAMPLES = 2**31 // (2 * POSITIONS) + 1
SHAPE = SAMPLES, 2, 64, 64


def ends_of_many(*args):
    """Count as ``range`` does, but only the ends of a grid: at which of them the far values are depends on the pass."""
    return (0, *range(args[0] - 3, args[0])) if len(args) == 1 and args[0] > 1000 else range(*args)


def far(last, **form):
    """Return a tensor of SHAPE whose last sample alone has been written."""
    x = torch.empty(SHAPE, dtype=last.dtype, **form)
    x[-1] = last
    return x


def check(name, forward, backward, on_chip, channels_last):
    _launch.ON_CHIP = on_chip
    _launch.forget_plans()
    torch.manual_seed(0)
    x, dy = (torch.randn(SHAPE[1:]).half() for _ in range(2))
    form = {"memory_format": torch.channels_last} if channels_last else {}
    near = (t.unsqueeze(0).to(**form) for t in (x, dy))
    many = far(x, **form), far(dy, **form)
    assert many[0].numel() > 2**31
    found = []
    for one, grad in (near, many):
        y, *kept = forward(one)
        dx, *_ = backward(grad, one, *kept)
        found.append(torch.stack([y[-1, -1, -1, -1], dx[-1, -1, -1, -1]]))
    where = f"{name}, {'channels-last' if channels_last else 'contiguous'}, {on_chip} values on chip"
    assert found[0].all(), where
    torch.testing.assert_close(found[1], found[0], msg=lambda text: f"{where}: {text}")


def main():
    torch.utils.deterministic.fill_uninitialized_memory = False
    interpreter.range = ends_of_many
    _passes.ADDED = 1 << 14  # of the gradients of so many samples: the interpreter takes its time per step
    gn, bn = (importlib.import_module(f"normplug.kernels.{name}") for name in ("group_norm", "batch_norm"))
    w, v = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    by_batch = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 0.5]), w, v
    for channels_last in (False, True):
        check(
            "bn",
            lambda x: (bn.normalize(x, *by_batch, "silu", None, None, None),),
            lambda dy, x: bn.dx(dy, x, *by_batch, "silu", None, v, w),
            1,
            channels_last,
        )
        for on_chip in (1, 16384):
            check(
                "gn",
                lambda x: gn.forward(x, 2, w, v, 1e-5, None, None),
                lambda dy, x, mean, rstd: gn.backward(dy, x, mean, rstd, w, v, None, None),
                on_chip,
                channels_last,
            )


if __name__ == "__main__":
    main()
