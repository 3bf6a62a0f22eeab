"""Triton without a GPU: it compiles for one, and hands what would be started to a function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["H100", "current_target", "stub_driver"]

H100 = GPUTarget("cuda", 90, 32)


def current_target() -> GPUTarget:
    """Return what Triton compiles for here, a GPU being there."""
    return driver.active.get_current_target()


@contextmanager
def stub_driver(target: GPUTarget, start: Callable[..., Any] = lambda *_: None) -> Iterator[None]:
    """Let Triton compile for a target and start kernels by calling a function."""

    class Utils:
        def load_binary(self, _name: str, _kernel: bytes, _shared: int, _device: int) -> tuple[int, ...]:
            return 1, 2, 64, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, _device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    class Driver:
        utils = Utils()

        def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., Any]:
            return start

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return target

        def get_device_capability(self, _device: int) -> tuple[int, int]:
            return divmod(target.arch, 10)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, name: str) -> str:
            return name

    before = driver._active
    driver.set_active(Driver())
    try:
        yield
    finally:
        driver._active = before
