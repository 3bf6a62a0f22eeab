"""What has to stand beside a number: the machine, the versions, the commit, the date."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import normplug
from normplug.bench.peers import versions

__all__ = ["conditions", "current_commit", "describe", "facts", "slug"]


def facts(device: torch.device, command: Sequence[str], commit: str | None = None) -> dict[str, object]:
    """Return what a benchmark was run on.

    Args:
        device: The device that was measured.
        command: The command line.
        commit: Of normplug, where its folder is no git repository (a copy on a GPU machine).
    """
    on_gpu = device.type == "cuda"
    gpu = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "device": gpu.name if gpu else processor(),
        "device_type": device.type,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "memory_gib": round(gpu.total_memory / 2**30) if gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"normplug": normplug.__version__, **versions()},
        "commit": commit or current_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(command),
    }


# Name of a reading -> what nvidia-smi calls it.
READINGS = {
    "SM clock, MHz": "clocks.sm",
    "SM clock at most, MHz": "clocks.max.sm",
    "memory clock, MHz": "clocks.mem",
    "temperature, °C": "temperature.gpu",
    "power, W": "power.draw",
    "throttle reasons": "clocks_throttle_reasons.active",
}


def conditions(device: torch.device) -> dict[str, str]:
    """Return clocks, temperature and power of a GPU now, as nvidia-smi has them; nothing where it has none."""
    if device.type != "cuda":
        return {}
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _output("nvidia-smi", which, f"--query-gpu={','.join(READINGS.values())}", "--format=csv,noheader,nounits")
    values = [value.strip() for value in (line or "").split(",")]
    return dict(zip(READINGS, values, strict=True)) if len(values) == len(READINGS) else {}


def describe(found: dict) -> list[str]:
    """Return the facts as lines of Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    missing = ", ".join(name for name, version in found["versions"].items() if not version)
    gpu = f", driver {found['driver']}, CUDA {found['cuda']}" if found["device_type"] == "cuda" else ""
    threads = f", {found['threads']} CPU thread(s)"
    lines = [
        f"- device: {found['device']}{gpu}{threads}",
        f"- versions: {packages}, Python {found['python']}",
        f"- commit: {found['commit'] or 'unknown'}; date: {found['date']}",
        f"- command: `{found['command']}`",
    ]
    if missing:
        lines.insert(2, f"- not installed: {missing}")
    return lines


def slug(name: str) -> str:
    """Return the name of a device as a folder: 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor() -> str:
    """Return the name of the CPU and how many cores of it there are."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = found.group(1).strip() if found else name
    return f"CPU {name}, {os.cpu_count()} cores"


def current_commit() -> str | None:
    """Return the commit of normplug's folder, and whether it has changes since; None where it is no git repository."""
    folder = Path(normplug.__file__).parent
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "-C", str(folder), "status", "--porcelain", "-uno")
    return f"{commit} and changes" if changed else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
