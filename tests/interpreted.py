"""A pytest plugin that runs the kernels in place of the references, in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 pytest -p interpreted tests/test_layers.py

The tests of ops and layers then judge what CUDA would run: autograd, autocast, layouts, slices, empty batches and all.
"""

import importlib

from torch.library import CustomOpDef

register_for_cuda = CustomOpDef.register_kernel


def register_for_cpu_too(self, device_types, fn=None, /):
    return register_for_cuda(self, ["cuda", "cpu"] if device_types == "cuda" else device_types, fn)


CustomOpDef.register_kernel = register_for_cpu_too


def pytest_configure(config):
    importlib.import_module("normplug.ops.group_norm")._leave_to_aten = lambda *_: False  # it spares CPUs the op
    # exp of a large number is infinite on a GPU too, and a sigmoid then 0; numpy has more to say about it
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in exp:RuntimeWarning")
