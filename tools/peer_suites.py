"""Run the toolkits' own tests with and without normplug, and print what it changes.

FOLDER holds checkouts of the toolkits, at the versions that are installed: their tests are run, on the installed
packages. Every test file has a process of its own. Files with a test whose outcome is another are run again, and what
is not another the second time is a matter of chance. Where mmcv has no compiled ops, normplug's stand-ins for them are
on both sides: mmdet and mmaction2 cannot be imported without. Without normplug torch.load reads any pickle, as it did
when the toolkits were written: tests that fail in it for today's torch would compare nothing.

Results go to stdout, progress to stderr. Exit code: 0 nothing is lost but what is named in BY_DESIGN; 1 something is;
2 wrong arguments.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

# Distribution: its package, and what every one of its test files imports sooner or later. One process imports it,
# and forks for each file.
PRELOAD = {
    "mmengine": ("mmengine", ["mmengine.testing", "mmengine.runner"]),
    "mmcv": ("mmcv", ["mmcv.cnn", "mmcv.ops", "mmcv.transforms"]),
    "mmdet": ("mmdet", ["mmdet.apis", "mmdet.datasets", "mmdet.engine", "mmdet.evaluation", "mmdet.models"]),
    "mmaction2": ("mmaction", ["mmaction.apis", "mmaction.datasets", "mmaction.engine", "mmaction.models"]),
    "mmsegmentation": ("mmseg", ["mmseg.apis", "mmseg.datasets", "mmseg.engine", "mmseg.models"]),
    "mmpretrain": ("mmpretrain", ["mmpretrain.apis", "mmpretrain.datasets", "mmpretrain.engine", "mmpretrain.models"]),
}
SIDES = ("without", "with")
# What a test asks of a toolkit and normplug does otherwise, on purpose.
BY_DESIGN = {
    "tests/test_hooks/test_checkpoint_hook.py::TestCheckpointHook::test_before_train": (
        "the path of the best checkpoint comes from a file, and what it names is deleted later: one outside of the "
        "run's folder, or that is not there, is not believed"
    ),
    "tests/test_cnn/test_build_layers.py::test_build_norm_layer": (
        "it wants an AssertionError where GN comes without num_groups: ours has 32 by default, as the paper, and says "
        "that they do not divide 3 channels"
    ),
    "tests/test_hooks/test_ema_hook.py::TestEMAHook::test_with_runner": (
        "it loads a checkpoint into a model that none of its weights belongs to: mmengine goes on with the initial "
        "values, and we refuse"
    ),
    "tests/test_runner/test_runner.py::TestRunner::test_checkpoint": (
        "it wants the functions of HistoryBuffer back from a checkpoint: ours hold plain values, which need no trust, "
        "and the functions come with the class"
    ),
}
GRAVITY = ("absent", "unfinished", "passed", "skipped", "xfailed", "xpassed", "failed", "error")


@dataclass
class Result:
    """What came of the tests of one side.

    Attributes:
        outcomes: By test: one of GRAVITY, or "crashed" or "timeout" of the test that ran when its process ended.
        messages: First line of what those that failed say.
        ends: By file: how its process ended, where that was not by itself.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)


@dataclass
class Change:
    """A test whose outcome is another with normplug."""

    test: str
    without: str
    with_: str
    message: str = ""

    @property
    def kind(self) -> str:
        if self.test in BY_DESIGN:
            return "by design"
        return "gained" if self.with_ == "passed" else "lost"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    report, lost = {}, 0
    for name, files in select(args.folder, args.only).items():
        with tempfile.TemporaryDirectory(prefix="peer-suites-") as scratch:
            suite = Suite(name, args.folder / name, Path(scratch), args.timeout)
            results = {side: suite.run(side, files) for side in SIDES}
            changes, by_chance = suite.confirm(results)
        show(name, results, changes, by_chance)
        lost += sum(change.kind == "lost" for change in changes)
        report[name] = {side: asdict(result) for side, result in results.items()}
        report[name] |= {"changes": [{**asdict(c), "kind": c.kind} for c in changes], "by_chance": by_chance}
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
    return int(lost > 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"has checkouts, all or some of {', '.join(PRELOAD)}")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATH", help="in the folder: mmdet mmcv/tests/test_cnn"
    )
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="of one test file (%(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to it, toolkit by toolkit")
    args = parser.parse_args(argv)
    if not 0 < args.timeout < float("inf"):
        parser.error(f"--timeout is a number of seconds above 0, got {args.timeout:g}")
    args.folder = args.folder.resolve()
    found = [name for name in PRELOAD if (args.folder / name / "tests").is_dir()]
    if not found:
        parser.error(f"{args.folder} has none of {', '.join(f'{name}/tests' for name in PRELOAD)}")
    for name in found:
        installed, checked_out = installed_version(name), checkout_version(args.folder / name, PRELOAD[name][0])
        if installed != checked_out:
            parser.error(f"{args.folder / name} is version {checked_out}, and {installed} is installed: check that out")
    for path in args.only:
        if not (args.folder / path).exists() or Path(path).parts[:1] == () or Path(path).parts[0] not in found:
            parser.error(f"--only {path}: there is no such path in {args.folder}, below {', '.join(found)}")
    return args


def installed_version(name: str) -> str | None:
    for distribution in (name, f"{name}-lite"):  # of mmcv there are two
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def checkout_version(checkout: Path, package: str) -> str | None:
    file = checkout / package / "version.py"
    found = re.search(r"^__version__ = ['\"](.+)['\"]", file.read_text(), re.M) if file.is_file() else None
    return found and found[1]


def select(folder: Path, only: Sequence[str]) -> dict[str, list[str]]:
    """Return the test files of each toolkit, as paths in its checkout."""
    wanted = [folder / path for path in only] or [folder]
    selected = {}
    for name in PRELOAD:
        files = sorted((folder / name / "tests").rglob("test_*.py"))
        files = [f for f in files if any(f.is_relative_to(w) for w in wanted) and "data" not in f.parts[:-1]]
        if files:
            selected[name] = [str(file.relative_to(folder / name)) for file in files]
    return selected


# ---- running


class Suite:
    """The tests of one toolkit, in a folder that looks like a checkout whose package is the installed one.

    Args:
        name: The toolkit's name as a distribution.
        checkout: Is not written to.
        scratch: An empty folder.
        timeout: Seconds for a test file.
    """

    def __init__(self, name: str, checkout: Path, scratch: Path, timeout: float) -> None:
        self.name, self.checkout, self.timeout = name, checkout, timeout
        self.package, self.preload = PRELOAD[name]
        self.root, self.scratch = scratch / name, scratch

    def run(self, side: str, files: Sequence[str]) -> Result:
        self._make_root()
        lines = self.scratch / "outcomes.jsonl"
        lines.write_text("")
        server = _FORK.Process(target=self._serve, args=(side, files, lines))
        server.start()
        server.join()
        if server.exitcode:
            raise RuntimeError(f"{self.name}, {side} normplug: nothing could be run; what happened is printed above")
        return read(lines)

    def confirm(self, results: dict[str, Result]) -> tuple[list[Change], list[str]]:
        """Run again what is changed. What is not changed then takes part in no comparison."""
        first = compare(results)
        if not first:
            return [], []
        files = sorted({change.test.partition("::")[0] for change in first})
        again = {change.test for change in compare({side: self.run(side, files) for side in SIDES})}
        return [c for c in first if c.test in again], [c.test for c in first if c.test not in again]

    def _make_root(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        shutil.copytree(self.checkout / "tests", self.root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for entry in self.checkout.iterdir():  # configs, demo, tools, ...: tests look for them beside their folder
            if entry.name not in ("tests", self.package, "pytest.ini", "setup.cfg", ".git"):
                (self.root / entry.name).symlink_to(entry)
        origin = importlib.util.find_spec(self.package).origin
        (self.root / self.package).symlink_to(Path(origin).parent)
        (self.root / "pytest.ini").write_text("[pytest]\n")  # theirs want plugins, and fail on others' warnings

    def _serve(self, side: str, files: Sequence[str], lines: Path) -> None:
        """Import one side, then run each file in a fork of it."""
        os.environ |= {"MPLBACKEND": "Agg", "HOME": str(self.scratch), "PYTHONPATH": self._python_path()}
        if side == "without":
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        os.chdir(self.root)
        sys.path.insert(0, str(self.root))
        with (self.scratch / "log.txt").open("a") as log:
            progress = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
            try:
                import_side(side)
                for module in self.preload:
                    with contextlib.suppress(Exception):  # the tests that need it will say why
                        importlib.import_module(module)
                import pytest  # noqa: F401  once for all files
            except BaseException:
                traceback.print_exc(file=progress)
                raise
            for i, file in enumerate(files, 1):
                begin = time.monotonic()
                with lines.open("a") as stream:
                    end = self._run_file(file, stream)
                    print(json.dumps({"file": file, "end": end}), file=stream)
                took = f"{time.monotonic() - begin:.1f} s"
                print(f"[{i}/{len(files)}] {side} {self.name}/{file} {took} {end}".rstrip(), file=progress)

    def _run_file(self, file: str, stream: TextIO) -> str:
        """Run the tests of a file in a process, and return how it ended where that was not by itself."""
        process = _FORK.Process(target=_test, args=(file, stream))
        process.start()
        process.join(self.timeout)
        running = process.is_alive()
        with contextlib.suppress(ProcessLookupError):  # it, and what it has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if running:
            return "timeout"
        return "" if process.exitcode == 0 else "crashed"

    def _python_path(self) -> str:
        return os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))


_FORK = multiprocessing.get_context("fork")


def _test(file: str, stream: TextIO) -> None:
    import pytest

    os.setsid()
    # --tb=line, for others parse the source, in which Python 3.11 fails where an object's __del__ does at the same time
    options = ["-p", "no:cacheprovider", "-q", "--tb=line", "--rootdir=."]
    code = pytest.main([*options, file], plugins=[Outcomes(stream)])
    sys.stdout.flush()
    os._exit(code == pytest.ExitCode.INTERNAL_ERROR)  # threads that tests have left running are nobody's fault


def import_side(side: str) -> None:
    """Import normplug, or only what stands in for modules without which the toolkits cannot be imported."""
    if side == "with":
        import normplug  # noqa: F401

        return
    bare = ModuleType("normplug")  # a package whose __init__ has not run
    bare.__path__ = list(importlib.util.find_spec("normplug").submodule_search_locations)
    sys.modules["normplug"] = bare
    from normplug.openmmlab import _stand_ins

    _stand_ins.install()


class Outcomes:
    """A plugin of pytest that writes each outcome when it is known."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def _write(self, test: str, outcome: str, message: str = "") -> None:
        print(json.dumps({"test": test, "outcome": outcome, "message": message}), file=self.stream, flush=True)

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self._write(nodeid, "unfinished")

    def pytest_runtest_logreport(self, report: Any) -> None:
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if outcome == "skipped" else "xpassed"
        if report.when == "call" or outcome != "passed":
            self._write(
                report.nodeid, "error" if report.when != "call" and outcome == "failed" else outcome, first_line(report)
            )

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self._write(report.nodeid, "error" if report.outcome == "failed" else "skipped", first_line(report))


def first_line(report: Any) -> str:
    """What a failed test says, in one line."""
    if report.outcome != "failed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [line for line in (crash.message if crash else report.longreprtext).splitlines() if line.strip()]
    return lines[0 if crash else -1].strip()[:300] if lines else ""


def read(lines: Path) -> Result:
    """Join what was written: of several reports on a test the gravest counts."""
    result, unfinished = Result(), []
    for row in map(json.loads, lines.read_text().splitlines()):
        if "test" in row:
            test, outcome = row["test"], row["outcome"]
            if GRAVITY.index(outcome) >= GRAVITY.index(result.outcomes.get(test, "absent")):
                result.outcomes[test] = outcome
                if row["message"]:
                    result.messages[test] = row["message"]
            unfinished.append(test)
        elif row["end"]:
            result.ends[row["file"]] = row["end"]
            left = [test for test in unfinished if result.outcomes[test] == "unfinished"] or [row["file"]]
            result.outcomes |= dict.fromkeys(left, row["end"])
            unfinished = []
    return result


# ---- comparing


def compare(results: dict[str, Result]) -> list[Change]:
    """Return the tests of which the outcomes differ.

    Where both sides ran out of time, which tests they came to is a matter of chance: those that one has not ended are
    left out.
    """
    without, with_ = (results[side] for side in SIDES)
    slow = {file for file, end in without.ends.items() if with_.ends.get(file) == end == "timeout"}
    messages = without.messages | with_.messages
    changes = []
    for test in {**without.outcomes, **with_.outcomes}:
        pair = tuple(side.outcomes.get(test, "absent") for side in (without, with_))
        by_time = test.partition("::")[0] in slow and {"absent", "timeout"} & {*pair}
        if pair[0] != pair[1] and not by_time:
            changes.append(Change(test, *pair, messages.get(test, "")))
    return changes


def fail_otherwise(results: dict[str, Result]) -> dict[tuple[str, str], list[str]]:
    """Return the tests that fail on both sides by different exceptions, by the pair of these.

    What follows the first exception is not compared, and the second may be of our making.
    """
    without, with_ = (results[side].messages for side in SIDES)
    found: dict[tuple[str, str], list[str]] = {}
    for test in without.keys() & with_.keys():
        pair = exception_of(without[test]), exception_of(with_[test])
        if pair[0] != pair[1]:
            found.setdefault(pair, []).append(test)
    return {pair: sorted(found[pair]) for pair in sorted(found)}


def exception_of(message: str) -> str:
    return "AssertionError" if message.startswith("assert ") else message.partition(":")[0]


def show(name: str, results: dict[str, Result], changes: Sequence[Change], by_chance: Sequence[str]) -> None:
    print(f"\n{name}")
    for side in SIDES:
        counts = Counter(results[side].outcomes.values())
        print(f"  {side:8}", ", ".join(f"{counts[outcome]} {outcome}" for outcome in sorted(counts, key=order)))
    for line in told(changes, by_chance):
        print(f"  {line}")
    for (without, with_), tests in fail_otherwise(results).items():
        print(f"  {len(tests)} fail with {without} -> with {with_}: {', '.join(tests)}")
    sys.stdout.flush()


def order(outcome: str) -> tuple[bool, str]:
    return outcome != "passed", outcome


def told(changes: Sequence[Change], by_chance: Sequence[str]) -> Iterator[str]:
    if not changes:
        yield "no test has another outcome"
    for change in sorted(changes, key=lambda change: (change.kind, change.test)):
        yield f"{change.kind}: {change.test}: {change.without} -> {change.with_}"
        if why := BY_DESIGN.get(change.test) or change.message:
            yield f"    {why}"
    if by_chance:
        yield f"{len(by_chance)} differed once and not again: {', '.join(by_chance)}"


if __name__ == "__main__":
    raise SystemExit(main())
