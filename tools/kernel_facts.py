"""Compile every kernel for sm_80 and sm_90, on a machine with or without a GPU, and tabulate what came out.

The launches are those of the ops themselves: they run on tensors without memory, and each start of a kernel is caught
and compiled with the same types, constants and alignments. For every dtype and memory format the table shows
registers, shared memory, spilled bytes, and the width in bits of loads and stores of the big tensors. Written to
docs/kernels.md.

Exit code: 0 all facts are within what the launches assume; 1 some are not, named on stderr (with --check nothing is
written, and a table that lacks a kernel counts too).
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", "0") != "0":
    print("TRITON_INTERPRET is ignored: this tool compiles", file=sys.stderr)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normplug.kernels import _recording
from normplug.kernels._recording import resolve
from normplug.reporting import markdown_table

DOC = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- facts: python tools/kernel_facts.py -->", "<!-- end of facts -->"
ARCHS = (80, 90)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Shapes of Mask R-CNN R50-FPN and I3D R50: maps whose groups are split, the largest that fit, and a RoI head's.
# One sample, one channel, one value: what is 1 is a constant to the compiler. These compile, and have no rows.
EDGES = (1, 1, 7, 1), (1, 1, 70, 1500), (1, 3, 1, 1)
SHAPES = (2, 256, 200, 336), (8, 256, 8, 56, 56), (2, 256, 25, 42), (2, 256, 32, 44), (1024, 256, 14, 14)
FILES = "group_norm", "batch_norm", "evonorm_s0", "evonorm_b0", "filter_response_norm", "weight_standardize"
# kernels that write a tensor of the input's size
STREAMS = {"apply", "gradient", "group_forward", "group_backward", "standardize", "standardize_one"}
HEADER = [
    "op",
    "kernel",
    "dtype",
    "layout",
    "arch",
    "warps",
    "registers",
    "shared (B)",
    "spills (B)",
    "loads",
    "stores",
    "rows",
]


@dataclass(frozen=True)
class Launch:
    """A start of a kernel in an op, on a tensor laid out in one way."""

    op: str
    layout: str
    seen: _recording.Launch

    @property
    def kernel(self) -> str:
        return self.seen.kernel

    @property
    def constants(self) -> tuple[tuple[str, Any], ...]:
        return self.seen.constants

    @property
    def width(self) -> int:
        """Bits that neighbouring values allow to load at once: rows start at multiples of VEC values."""
        constants = dict(self.constants)
        if "DTYPE" in constants:  # the kernel has a branch for what is aligned
            return 128
        return min(128, constants.get("VEC", 1) * int(self.dtype.strip("bfp")))

    @property
    def dtype(self) -> str:
        if "DTYPE" in dict(self.constants):  # where tensors are given by address
            return dict(self.constants)["DTYPE"].name
        types = [t for _, t in self.seen.signature if t.startswith("*")]
        return next((t[1:] for t in types if t not in ("*fp32", "*i32")), "fp32")


def calls() -> Iterator[tuple[str, str, Any]]:
    """Yield op, layout and a call, for every op, dtype and layout, with groups that fit on chip and that do not."""
    empty = partial(torch.empty, device="meta")
    gn, bn, s0, b0, frn, ws = (importlib.import_module(f"normplug.kernels.{name}") for name in FILES)
    for dtype in DTYPES.values():
        for shape in SHAPES + (EDGES if dtype == torch.float32 else ()):
            last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            for layout, form in (("contiguous", torch.contiguous_format), ("channels-last", last)):
                x = empty(shape, dtype=dtype).to(memory_format=form)
                n, c = shape[:2]
                w = empty(c)
                g = 32 if c % 32 == 0 else 1
                stat, groups, instances = empty(c), empty(n, g), empty(n, c)
                edge = "-" if shape in EDGES else ""
                for op, call in (
                    ("group_norm", partial(gn.forward, x, g, w, w, 1e-5, "relu", x)),
                    ("group_norm", partial(gn.backward, x, x, groups, groups, w, w, "relu_of_output", x)),
                    ("group_norm", partial(gn.backward, x, x, groups, groups, w, w, "relu", None)),
                    ("batch_norm", partial(bn.forward, x, w, w, 1e-5, "relu", x)),
                    ("batch_norm", partial(bn.backward, x, x, stat, stat, w, w, "relu_of_output", x)),
                    ("batch_norm", partial(bn.stats, x)),
                    ("batch_norm", partial(bn.normalize, x, stat, stat, w, w, "relu", x, None, None)),
                    ("batch_norm", partial(bn.reduce, x, x, stat, stat, w, w, "relu_of_output", x)),
                    ("batch_norm", partial(bn.dx, x, x, stat, stat, w, w, "relu_of_output", x, stat, stat)),
                    ("batch_norm", partial(bn.reduce, x, x, stat, stat, w, w, "relu", None)),
                    ("batch_norm", partial(bn.dx, x, x, stat, stat, w, w, "relu", None, stat, stat)),
                    ("evonorm_s0", partial(s0.forward, x, g, w, w, w, 1e-5)),
                    ("evonorm_s0", partial(s0.backward, x, x, groups, groups, w, w)),
                    ("evonorm_b0", partial(b0.forward, x, w, w, w, None, 1e-5)),
                    ("evonorm_b0", partial(b0.backward, x, x, instances, instances, stat, w, w, 1e-5, True)),
                    ("filter_response_norm", partial(frn.forward, x, w, w, w, 1e-6)),
                    ("filter_response_norm", partial(frn.backward, x, x, instances, w, w, w)),
                ):
                    yield edge + op, layout, call
        weights = [empty(64, 3, 7, 7, dtype=dtype), empty(256, 64, 1, 1, dtype=dtype)]
        one = weights[1]
        stat = empty(320, 1)
        yield "weight_standardize", "any", partial(ws.forward, one, 1e-5, 1, False)
        yield "weight_standardize", "any", partial(ws.backward, one, one, stat[:256], stat[:256], 1e-5, 1, False)
        yield "weight_standardize", "any", partial(ws.forward_many, weights, 1e-5, 1, False)
        yield "weight_standardize", "any", partial(ws.backward_many, weights, weights, stat, stat, 1e-5, 1, False)


def launches() -> list[Launch]:
    """Return the distinct launches, those that the compiler cannot tell apart once."""
    found: dict[_recording.Launch, Launch] = {}
    for op, layout, call in calls():
        for seen in _recording.record(call):
            found.setdefault(seen, Launch(op, layout, seen))
    return list(found.values())


def compiled(launch: Launch, arch: int) -> Any:
    """Compile one launch, as Triton would on a GPU of that architecture."""
    seen = launch.seen
    constants = {name: resolve(v) if isinstance(v, str) and ":" in v else v for name, v in seen.constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i in seen.aligned}
    source = ASTSource(resolve(seen.kernel), dict(seen.signature), constants, attributes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": seen.warps})


def compile_for(launch: Launch, arch: int) -> list[str]:
    """Compile one launch and return its row of the table."""
    kernel = compiled(launch, arch)
    usage = resource_usage(kernel.asm["cubin"])
    loads, stores = (widths(kernel.asm["ptx"], what, launch) for what in ("ld", "st"))
    name = launch.kernel.split(":")[1].lstrip("_")
    spills = usage["STACK"] + usage["LOCAL"]
    numbers = [launch.seen.warps, usage["REG"], kernel.metadata.shared, spills]
    return [
        launch.op,
        name,
        launch.dtype,
        launch.layout,
        f"sm_{arch}",
        *map(str, numbers),
        loads,
        stores,
        str(launch.width),
    ]


def resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def widths(ptx: str, what: str, launch: Launch) -> str:
    """Return the widest access of global memory in bits; what is loaded per channel is narrower."""
    found = [1]
    for line in re.findall(rf"\b{what}\.global\S*", ptx):
        vector = re.search(r"\.v(\d)", line)
        found.append(int(vector.group(1) if vector else 1) * int(re.search(r"\.[busf](\d+)$", line).group(1)))
    return str(max(found))


# Two 64-bit values: what Triton 3.6.0 keeps in local memory in one of 536 kernels (standardize_one, fp32, sm_90).
SPILL = 16


def complaints(row: Sequence[str]) -> list[str]:
    """Return what is wrong with a kernel."""
    facts = dict(zip(HEADER, row, strict=True))
    name = " ".join(row[:5])
    wrong = []
    if int(facts["spills (B)"]) > SPILL:
        wrong.append(f"{name}: {facts['spills (B)']} bytes of local memory")
    if int(facts["registers"]) * 32 * int(facts["warps"]) > 65536:
        wrong.append(f"{name}: {facts['registers']} registers do not fit {facts['warps']} warps")
    if int(facts["shared (B)"]) > 48 * 1024:
        wrong.append(f"{name}: {facts['shared (B)']} bytes of shared memory")
    if int(facts["loads"]) < int(facts["rows"]):
        wrong.append(f"{name}: loads of {facts['loads']} bits from rows that allow {facts['rows']}")
    if facts["kernel"] in STREAMS and int(facts["stores"]) < int(facts["rows"]):
        wrong.append(f"{name}: stores of {facts['stores']} bits to rows that allow {facts['rows']}")
    return wrong


def table(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return a row for each op, kernel, dtype and layout: the range over shapes and architectures."""
    groups: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[:4]), []).append(row)
    lines = [[h for h in HEADER if h != "arch"]]
    for key, members in groups.items():
        numbers = [sorted({int(row[i]) for row in members}) for i in range(5, len(HEADER))]
        lines.append([*key, *(f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}" for n in numbers)])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing, tell whether the facts hold")
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    args = p.parse_args(argv)
    tasks = [(launch, arch) for launch in launches() for arch in ARCHS]
    print(f"{len(tasks)} kernels to compile", file=sys.stderr)
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = sorted(set(map(tuple, pool.map(compile_for, *zip(*tasks, strict=True), chunksize=8))))
    wrong = [line for row in rows for line in complaints(row)]
    rows = [row for row in rows if not row[0].startswith("-")]
    text = DOC.read_text()
    head, rest = text.split(BEGIN)
    if args.check:
        known = {tuple(cell.strip() for cell in line.strip("|").split("|")[:4]) for line in text.splitlines()}
        wrong += [
            f"{DOC.name} has no row for {' '.join(row[:4])}" for row in table(rows)[1:] if tuple(row[:4]) not in known
        ]
    else:
        by = f"Compiled by Triton {triton.__version__} for sm_80 and sm_90, {len(tasks)} times in all."
        DOC.write_text(f"{head}{BEGIN}\n\n{by}\n\n{markdown_table(table(rows))}\n\n{END}{rest.split(END)[1]}")
    print("\n".join(wrong) or f"{len(tasks)} compiled, all as the launches assume", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
