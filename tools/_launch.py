"""What _dist.sh runs: looks at what a launch says of nodes, port and GPUs, and hands over to torchrun.

torchrun waits ten minutes for nodes that cannot come, and ends a mistake of one process in forty lines of its own. Here
the nodes meet first, say who is missing, and find out in seconds that they do not agree.

Exit code: torchrun's; 2 for a mistake, in the launch or in the arguments of the tool, which has said it itself.
"""

import contextlib
import json
import logging
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

USAGE = "NNODES=2 NODE_RANK=0 MASTER_ADDR=10.1.1.1 PORT=29500 on the first node, NODE_RANK=1 on the second"


class LaunchError(ValueError):
    """The nodes of a launch cannot work together as it says."""


def whole(name: str, default: int, least: int, most: int) -> int:
    """Return a number from the environment.

    Raises:
        LaunchError: If it is none, or out of range.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or not least <= int(text) <= most:
        raise LaunchError(f"{name}={text!r}: expected a whole number from {least} to {most}.")
    return int(text)


def check(processes: int) -> tuple[int, int, str, int]:
    """Return nodes, rank of this one, address and port of the first, as the environment says.

    Raises:
        LaunchError: If they contradict each other, or this machine.
    """
    nodes = whole("NNODES", 1, 1, 10_000)
    if "NODE_RANK" in os.environ and nodes == 1 and os.environ["NODE_RANK"] != "0":
        raise LaunchError(f"NODE_RANK={os.environ['NODE_RANK']!r} without NNODES: for several nodes set {USAGE}.")
    if missing := [name for name in ("NODE_RANK", "MASTER_ADDR") if nodes > 1 and not os.environ.get(name)]:
        raise LaunchError(f"NNODES={nodes} needs {' and '.join(missing)}: set {USAGE}.")
    rank, port = whole("NODE_RANK", 0, 0, nodes - 1), whole("PORT", 29500, 1, 65535)
    address = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    try:
        family(address, port)
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR={address!r} is no address that this machine can find ({error}).") from error
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise LaunchError(
            f"{processes} processes were asked for and {gpus} GPUs are visible here: one process per GPU."
        )
    if rank == 0:
        try:
            socket.create_server(("", port), family=family(address, port)).close()
        except OSError as error:
            raise LaunchError(
                f"PORT={port} cannot be used ({os.strerror(error.errno or 0)}): another run may have it; choose "
                f"another, such as PORT={free_port()}, on every node."
            ) from error
    return nodes, rank, address, port


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def meet(nodes: int, rank: int, address: str, port: int, seconds: float) -> None:
    """Wait until all nodes are there, and see that they agree.

    Node 0 greets whoever comes with its number of nodes, and is told theirs and their rank, each in a line of json.
    When all are there, it frees the port for torchrun and lets them go.

    Raises:
        LaunchError: If one has not come in time, or says something else of how many there are or of who it is.
    """
    end = time.monotonic() + seconds
    if rank == 0:
        receive(nodes, address, port, seconds, end)
        return
    say(f"node {rank} of {nodes} waits for node 0 at {address}:{port}, {seconds:.0f} seconds at most (WAIT)")
    where = f"MASTER_ADDR={address} PORT={port}"
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > end:
                raise LaunchError(
                    f"node 0 has not answered at {where} in {seconds:.0f} seconds ({error}): start it, or check "
                    f"address, port and firewall."
                ) from error
            time.sleep(0.3)
    with connection, connection.makefile("rw") as line:
        try:
            connection.settimeout(10)
            write(line, {"nodes": nodes, "rank": rank})
            if read(line).keys() != {"nodes"}:
                raise ValueError("another greeting")
        except (OSError, ValueError) as error:
            raise LaunchError(
                f"what answers at {where} is no node 0 that waits for others ({error}): was it started with "
                f"NNODES={nodes} and this script, or has another program the port?"
            ) from error
        try:
            connection.settimeout(max(end - time.monotonic(), 0) + 5)  # node 0 is to give up first, and say why
            refused = read(line)["refused"]
        except (OSError, ValueError, KeyError) as error:
            raise LaunchError(f"node 0 at {where} has gone before all {nodes} nodes were there.") from error
    if refused:
        raise LaunchError(refused)


def receive(nodes: int, address: str, port: int, seconds: float, end: float) -> None:
    """Wait for the other nodes, as node 0."""
    joined: dict[int, tuple[socket.socket, TextIO]] = {}
    tell_at = time.monotonic() + 2
    refused = ""
    with socket.create_server(("", port), family=family(address, port)) as server:
        server.settimeout(0.5)
        while not refused and (missing := [rank for rank in range(1, nodes) if rank not in joined]):
            names = ", ".join(map(str, missing))
            if time.monotonic() > end:
                refused = f"node {names} of {nodes} has not come in {seconds:.0f} seconds."
                break
            if time.monotonic() > tell_at:
                say(f"node 0 of {nodes} waits for node {names}, {seconds:.0f} seconds at most (WAIT)")
                tell_at = time.monotonic() + 30
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                line = connection.makefile("rw")
                write(line, {"nodes": nodes})
                guest = read(line)
                theirs, rank = guest["nodes"], guest["rank"]
            except (OSError, ValueError, KeyError, TypeError):  # nobody has come, or a stranger
                continue
            if theirs != nodes:
                refused = f"NNODES={nodes} on node 0 and NNODES={theirs} on node {rank}: expected the same on all."
            elif rank in joined and not has_left(joined[rank][0]):
                refused = f"two nodes have NODE_RANK={rank}: expected 0 to {nodes - 1}, each once."
            joined[-1 if refused else rank] = connection, line
    for connection, line in joined.values():
        with contextlib.suppress(OSError), connection:
            write(line, {"refused": refused})
    if refused:
        raise LaunchError(refused)


def family(address: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(address, port)[0][0]


def has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection; it says nothing after its first line."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)


def write(line: TextIO, content: dict) -> None:
    line.write(json.dumps(content) + "\n")
    line.flush()


def read(line: TextIO) -> dict:
    """Return what the other side says. Raises ValueError if it is none of us."""
    text = line.readline(1000)
    content = json.loads(text or "null")
    if not isinstance(content, dict):
        raise ValueError("no answer" if not text else f"{text[:40]!r}")
    return content


def say(sentence: str) -> None:
    print(f"_dist.sh: {sentence}", file=sys.stderr, flush=True)


def is_news(record: logging.LogRecord) -> bool:
    """Whether torchrun says more than that it ends the processes of a mistake that one of them has told."""
    text = record.getMessage()
    return "failed (exitcode: 2)" not in text and "closing signal SIGTERM" not in text


def main(argv: list[str]) -> int:
    tool, config, processes, *arguments = argv
    try:
        nodes, rank, address, port = check(int(processes))
        if nodes > 1:
            meet(nodes, rank, address, port, whole("WAIT", 600, 1, 86_400))
    except LaunchError as error:
        say(str(error))
        return 2
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(is_news)
    flags = [f"--nnodes={nodes}", f"--node_rank={rank}", f"--master_addr={address}", f"--master_port={port}"]
    flags += [f"--nproc_per_node={processes}", str(Path(__file__).with_name(f"{tool}.py"))]
    try:
        run.main([*flags, config, *arguments, "--launcher", "pytorch"])
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != 2:
            raise
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
