"""Another version of ours in the same run: ``--against REF`` of a git repository, in a process that waits its turn.

The ops and layers are those of REF; cases, checks and clocks are this version's, copied over REF's. The two processes
never work at the same time: this one asks for a batch of repetitions, as it does of its own contenders, and waits for
the times.
"""

import contextlib
import functools
import io
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from normplug.bench.cases import OPS, Problem, make_problem
from normplug.bench.measure import Batch, batch_of, brief, compare, lone_process_group, memory, run
from normplug.bench.peers import Contender
from normplug.bench.shapes import Shape

__all__ = ["Other", "unpacked"]

HERE = Path(__file__).resolve().parent
OWN = ["against.py", "cases.py", "measure.py", "peers.py", "shapes.py"]  # what the other process needs of this folder


@contextlib.contextmanager
def unpacked(ref: str, root: Path = HERE.parent.parent) -> Iterator[Path]:
    """Give a temporary folder with normplug as of a commit, branch or tag, and this version's benchmark in it.

    Raises:
        ValueError: If there is no such commit, or normplug's folder is no git checkout.
    """
    if _git(root, "rev-parse", "--git-dir") is None:
        raise ValueError(f"--against {ref} takes a git checkout of normplug, and {root} is none: clone the repository")
    commit = _git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if commit is None:
        raise ValueError(f"--against {ref}: no commit, branch or tag of {root} has that name; `git log` shows some")
    packed = _git(root, "archive", commit.decode().strip(), "normplug")
    if packed is None:
        raise ValueError(f"--against {ref}: that commit of {root} has no folder normplug/")
    with tempfile.TemporaryDirectory(prefix="normplug-against-") as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as files:
            files.extractall(folder, filter="data")
        bench = Path(folder, "normplug", "bench")
        shutil.rmtree(bench, ignore_errors=True)
        bench.mkdir()
        (bench / "__init__.py").touch()
        for name in OWN:
            shutil.copy(HERE / name, bench)
        yield Path(folder)


def _git(root: Path, *args: str) -> bytes | None:
    try:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


class Other:
    """The process of the other version, as long as the block lasts.

    Args:
        ref: What the version is called.
        folder: Where it was unpacked.
        device: Where it measures.
    """

    def __init__(self, ref: str, folder: Path, device: torch.device) -> None:
        self.name = f"normplug@{ref}"
        self.folder, self.device = folder, device

    def __enter__(self) -> "Other":
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "normplug.bench.against", str(theirs.fileno()), str(self.device)],
            cwd=self.folder,  # the first place that it imports from
            pass_fds=[theirs.fileno()],
            stdout=sys.stderr.fileno() if sys.stderr is sys.__stderr__ else subprocess.DEVNULL,
        )
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()  # and it ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # busy with a batch
            self.process.kill()
            self.process.wait()

    def ask(self, what: str, *args: Any) -> Any:
        """Call a method of the other process' ``Side``.

        Raises:
            RuntimeError: If it raised, or the process is no more.
        """
        try:
            self.connection.send((what, args))
            result, error = self.connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"the process of {self.name} has ended") from None
        if error:
            raise RuntimeError(error)
        return result

    def batch(self, direction: str) -> Batch:
        """Return how to repeat the prepared case there."""
        return functools.partial(self.ask, "batch", direction)


class Side:
    """What the other process does when it is asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.problem: Problem
        self.contender: Contender

    def prepare(self, op: str, shape: Shape, dtype: torch.dtype, channels_last: bool) -> str:
        """Make the inputs of a case; return what is wrong with the results."""
        problem = self.problem = make_problem(OPS[op], shape, dtype, channels_last, self.device)
        self.contender = Contender(op, lambda: problem.op.ours(**problem.tensors), problem.tensors)
        wrong = compare(problem, self.contender, ours=True)
        problem.reference.clear()
        return wrong

    def memory(self) -> tuple[int, int]:
        return memory(self.contender, self.problem.dys, self.device)

    def batch(self, direction: str, count: int, host_ms: float, cold: bool) -> tuple[list[float], list[float]]:
        contender, dys = self.contender, self.problem.dys
        call = contender.call if direction == "forward" else lambda: run(contender, dys)
        return batch_of(call, self.device)(count, host_ms, cold)


def serve(connection: Connection, device: torch.device) -> None:
    """Answer until nobody asks any more."""
    side = Side(device)
    with lone_process_group(device, True), contextlib.suppress(EOFError, OSError):
        while True:
            what, args = connection.recv()
            try:
                answer = getattr(side, what)(*args), ""
            except Exception as error:  # the run goes on without this case
                answer = None, brief(error)
            connection.send(answer)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # may reach both processes; the other ends this one, in its time
        signal.signal(number, signal.SIG_IGN)
    where = torch.device(sys.argv[2])
    if where.type == "cuda":
        torch.cuda.set_device(where)
    serve(Connection(int(sys.argv[1])), where)
