"""Files that are whole or not there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "remove_partial"]

_PARTIAL = ".partial"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name when it is whole.

    What is written goes to a hidden file in the same folder, onto the disk, and then to ``path`` in one step: whoever
    looks there finds the old file or the new one, after a kill, a full disk or a power cut as well. If anything is
    raised, the hidden file is removed and ``path`` is as it was.

    Args:
        path: The file, in a folder that exists; a link is followed.

    Yields:
        The open file, binary.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(os.path.realpath(path))
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, mode)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    if os.name == "posix":  # the new name must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial(folder: str | Path) -> None:
    """Remove what killed processes left of files in a folder where nobody writes now."""
    for file in Path(folder).glob(f".*{_PARTIAL}"):
        file.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
