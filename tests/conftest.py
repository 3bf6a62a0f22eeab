"""Seeds, deterministic algorithms (torch.empty is filled with NaN), and one thread: small tensors gain from no more.

Where there is no GPU the Triton kernels run in its interpreter, on CPU tensors.
"""

import os

import pytest
import torch
from mmengine.registry import DefaultScope

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    scopes = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()  # a test that runs a toolkit's tool leaves its scope behind
    DefaultScope._instance_dict.update(scopes)
    torch.use_deterministic_algorithms(False)
