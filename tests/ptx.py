"""Compile what the package launches and print the instructions of each kernel, as JSON: for a process of its own.

It must not have Triton's interpreter switched on. Launches that differ in sizes only share their instructions: one of
each kind is compiled. The activations are tried where the kernel takes one.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import kernel_facts

# float32 for both, but other activations and the half types, which are only converted, for one of them each.
ARCHS = {"fp32": kernel_facts.ARCHS, "bf16": kernel_facts.ARCHS[:1], "fp16": kernel_facts.ARCHS[1:]}


def kind(launch):
    """Return what decides on the arithmetic of a kernel: its code, dtype, and constants that are words or functions."""
    words = [(name, value) for name, value in launch.constants if value is not None and not isinstance(value, int)]
    return launch.kernel, launch.dtype, tuple(sorted(words, key=str))


def with_every_activation(launches):
    for launch in launches:
        yield launch
        if dict(launch.constants).get("ACT") == "linear" and launch.dtype == "fp32":
            for act in ("silu", "gelu"):
                constants = tuple((name, act if name == "ACT" else value) for name, value in launch.constants)
                yield dataclasses.replace(launch, seen=dataclasses.replace(launch.seen, constants=constants))


def instructions(ptx):
    return Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", ptx, re.MULTILINE))


def archs(launch):
    every = ARCHS[launch.dtype]
    return every[-1:] if dict(launch.constants).get("ACT") in ("silu", "gelu") else every


def compiled(launch, arch):
    kernel = kernel_facts.compiled(launch, arch)
    return {
        "name": " ".join(map(str, (*kind(launch), f"sm_{arch}"))),
        "act": dict(launch.constants).get("ACT"),
        "instructions": instructions(kernel.asm["ptx"]),
    }


def main():
    kinds = {}
    for launch in with_every_activation(kernel_facts.launches()):
        kinds.setdefault(kind(launch), launch)
    tasks = [(launch, arch) for launch in kinds.values() for arch in archs(launch)]
    with ProcessPoolExecutor() as pool:
        print(json.dumps(list(pool.map(compiled, *zip(*tasks, strict=True), chunksize=4))))


if __name__ == "__main__":
    main()
