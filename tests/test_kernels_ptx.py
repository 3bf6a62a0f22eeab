"""What Triton's interpreter cannot show: the instructions that a GPU would run, and loads that it leaves undefined.

The kernels are those that the package launches, whatever they are, compiled for sm_80 and sm_90 without either.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from normplug.ops._registration import has_triton

if not has_triton():
    pytest.skip("Triton comes with torch on Linux only", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "normplug" / "kernels").glob("*.py"))
FLOATS = r"(f16|bf16|f32|f64)(x2)?"

# Instruction -> why no kernel has it.
FORBIDDEN = {
    rf"(max|min)\.(?!.*NaN).*{FLOATS}": "drops NaN: give tl.maximum propagate_nan=tl.PropagateNan.ALL, or use tl.where",
    r"cvt\.(?!rn\.).*(f16|bf16)(x2)?\.f(32|64)": "rounds a half type other than to nearest",
    r"cvt\..*satfinite.*": "makes a number of infinity",
    rf"(atom|red)\..*{FLOATS}": "adds in an order that is another one in every run",
    r".*\.f64": "computes in double precision, at 1/2 to 1/64 of the speed: a constant that is none of float32's?",
    r"call(\..*)?": "calls a function, which keeps registers in memory",
    r".*\.approx\..*": "is an approximation that nobody has bounded",
    r".*\.ftz\..*": "takes numbers below 1.2e-38 for 0",
}
# Approximations that are bounded. PTX names the error: div.full has 2 ulps, denormals included; ex2.approx 2 ulps. The
# exponent of exp(x) is rounded before, so that it errs by |x| / 2 ulps more, but is then as small as exp(-|x|) in a
# sigmoid or a Gaussian, next to the 1 that either is added to.
BOUNDED = {"div.full.f32", "ex2.approx.f32"}
# CUDA's own erf, of 2 ulps: what it takes for 0 is added to 1.
ERF = {"abs.ftz.f32", "fma.rn.ftz.f32", "mul.ftz.f32", "add.ftz.f32", "ex2.approx.ftz.f32"}


@pytest.fixture(scope="module")
def compiled():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "ptx.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_function_for_gpus_is_looked_at(compiled):
    """Each is a kernel that was launched, a formula handed to one, or called by another."""
    functions = {f"normplug.kernels.{path.stem}:{f.name}": f for path in KERNELS for f in jitted(path)}
    called = {n.id for f in functions.values() for n in ast.walk(f) if isinstance(n, ast.Name)}
    seen = " ".join(kernel["name"] for kernel in compiled)
    assert not [name for name in functions if name not in seen and name.split(":")[1] not in called]


@pytest.mark.slow
def test_instructions_do_on_a_gpu_what_the_interpreter_does(compiled):
    wrong = [
        f"{kernel['name']}: {instruction} {why}"
        for kernel in compiled
        for instruction in kernel["instructions"]
        for pattern, why in FORBIDDEN.items()
        if re.fullmatch(pattern, instruction)
        and instruction not in BOUNDED
        and not (kernel["act"] == "gelu" and instruction in ERF)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_who_joins_sees_what_the_others_stored(compiled):
    """One operation of the whole GPU releases what a program has stored and acquires what the others have."""
    gathering = "_partial_statistics", "_channel_sums"
    kernels = [kernel for kernel in compiled if kernel["name"].split()[0].split(":")[1] in gathering]
    joining = [k for k in kernels if any(i.startswith("atom") for i in k["instructions"])]
    assert {k["name"].split()[0].split(":")[1] for k in joining} == set(gathering)
    for kernel in joining:
        atoms = [name for name in kernel["instructions"] if name.startswith(("atom", "red"))]
        assert len(atoms) == 1, kernel["name"]
        assert {"acq_rel", "gpu", "global"} <= set(atoms[0].split(".")), atoms
        assert any(name.startswith("ld.global.cg") for name in kernel["instructions"]), kernel["name"]
        assert kernel["instructions"].get("bar.sync", 0) + kernel["instructions"].get("barrier.sync", 0) >= 2
    # statistics are always joined, sums unless an all-reduce or the batch's variance comes between
    assert all(k in joining for k in kernels if "_partial_statistics" in k["name"])


def test_masked_loads_say_what_the_rest_is():
    """Where the mask is false and there is no ``other``, the interpreter loads 0 and a GPU anything."""
    loads = [
        (path, node)
        for path in KERNELS
        for function in jitted(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"
    ]
    assert loads
    for path, node in loads:
        given = {keyword.arg for keyword in node.keywords}
        masked = len(node.args) > 1 or "mask" in given
        where = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        assert not masked or "other" in given or len(node.args) > 2, where


def jitted(path):
    """Return the functions of a file that Triton compiles."""
    tree = ast.parse(path.read_text())
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
