"""A pytest plugin that runs the kernels in place of the references, in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 pytest -p interpreted tests/test_layers.py

The tests of ops and layers then judge what CUDA would run: autograd, autocast, layouts, slices, empty batches and all.
"""

import importlib

import torch

LIBRARY = torch.library.Library("normplug", "IMPL")


def pytest_configure(config):
    import normplug.ops  # noqa: F401  defines the ops
    from normplug.ops._registration import KERNELS

    for name, launch in KERNELS.items():
        LIBRARY.impl(name, launch, "CPU")
    importlib.import_module("normplug.ops.group_norm")._leave_to_aten = lambda *_: False  # it spares CPUs the op
    # exp of a large number is infinite on a GPU too, and a sigmoid then 0; numpy has more to say about it
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in exp:RuntimeWarning")
