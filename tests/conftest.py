"""Seeds, deterministic algorithms (torch.empty is filled with NaN), and one thread: small tensors gain from no more.

Where there is no GPU the Triton kernels run in its interpreter, on CPU tensors.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope

from normplug.layers import _convolution_trace

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is imported

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    scopes = dict(DefaultScope._instance_dict)
    # A CBN that an earlier test has left in training mode, held by a compiler's cache or by what failed: torch.compile
    # warns of its hook.
    for key in list(_convolution_trace._followers):
        _convolution_trace._remove(key)
    yield
    DefaultScope._instance_dict.clear()  # a test that runs a toolkit's tool leaves its scope behind
    DefaultScope._instance_dict.update(scopes)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """A source distribution of the tree, and the wheel that comes of it, both unpacked."""
    tmp = tmp_path_factory.mktemp("packages")
    tree = tmp / "tree"
    ignored = shutil.ignore_patterns(
        ".git", "__pycache__", "*.egg-info", ".*_cache", "build", "dist", "data", "work_dirs"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    (tree / "configs" / "digits" / "epoch_3.pth").touch()  # what lies about is not shipped
    (tree / "tools" / ".train.py.swp").touch()
    _build("sdist", tree, tmp)
    (archive,) = tmp.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp / "unpacked", filter="data")
    (unpacked,) = (tmp / "unpacked").iterdir()
    _build("wheel", unpacked, tmp)
    (wheel,) = tmp.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp / "installed")
    return unpacked, tmp / "installed"


def _build(kind, tree, out):
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
