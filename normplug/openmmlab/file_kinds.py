"""What a file is that should hold weights, told by its content and in a sentence."""

import json
import re
import tarfile
import zipfile
from pathlib import Path

__all__ = ["CheckpointError", "check_kind", "is_safetensors"]


class CheckpointError(ValueError):
    """A file of weights cannot be used. The message says which, why, and what to do."""


# ---- kinds of file, by their content

_ANEW = "Download it again"
# Beginnings of files that are something else: what they are, and what to do
_BEGINNINGS: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": (
        "a git-lfs pointer: a text of three lines that stands for the file",
        "Get the file itself: git lfs pull, or download it from the page of the repository",
    ),
    b"\x1f\x8b": ("a gzip archive", "Unpack it: gunzip, or tar xf if it is a .tar.gz"),
    b"\xfd7zXZ\0": ("an xz archive", "Unpack it: unxz, or tar xf if it is a .tar.xz"),
    b"BZh": ("a bzip2 archive", "Unpack it: bunzip2, or tar xf if it is a .tar.bz2"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "Unpack it: unzstd"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it: 7z x"),
    b"Rar!": ("a rar archive", "Unpack it: unrar x"),
    b"\x89HDF\r\n": (
        "an HDF5 file, as Keras and TensorFlow write it",
        "Get the weights for PyTorch, or convert them with the tools of the project they are from",
    ),
    b"GGUF": ("a GGUF file of a language model", "Get the weights for PyTorch"),
    b"\x89PNG": ("a PNG picture", _ANEW),
    b"\xff\xd8\xff": ("a JPEG picture", _ANEW),
    b"GIF8": ("a GIF picture", _ANEW),
    b"%PDF": ("a PDF document", _ANEW),
    b"\x7fELF": ("a program or library", _ANEW),
    b"SQLite format": ("an SQLite database", _ANEW),
}
# What pickles begin with, those of torch before 1.6 among them: a protocol, or in the oldest an opcode
_PICKLED = re.compile(rb"\x80[\x02-\x05]|\([dl]p?\d*\n|[}\]]q|c[\w.]+\n[\w.]+\n")
_ONLY_WEIGHTS = (
    "Save only the weights where the model can be built: torch.save(dict(state_dict=model.state_dict()), path)"
)


def check_kind(path: str | Path) -> None:
    """Look at the beginning and, of archives, the list of files: seconds before a model is built, or a pickle read.

    Args:
        path: A file on this machine.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If neither torch nor safetensors wrote it, or it is cut short; with its kind if that is known.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is {_folder(path)}. Expected: a checkpoint file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    with path.open("rb") as file:
        head = file.read(512)
    kind = _kind(path, head)
    if kind is not None:
        what, advice = kind
        raise CheckpointError(f"{path} is no checkpoint but {what}. {advice}.")


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as safetensors does: the length of a JSON object, and the object."""
    with Path(path).open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32


def _folder(path: Path) -> str:
    if (path / ".metadata").is_file():
        return (
            "a folder of torch.distributed.checkpoint; turn it into a file with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        )
    if (path / "saved_model.pb").is_file():
        return "a model of TensorFlow"
    files = [file.name for file in sorted(path.iterdir()) if file.suffix in (".pth", ".pt", ".safetensors")]
    return f"a folder, with {', '.join(files[:3])} in it" if files else "a folder"


def _kind(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that is no checkpoint, and what to do; None if nothing speaks against one."""
    if not head.strip(b"\0"):
        return ("an empty file" if path.stat().st_size == 0 else "a file of zeros"), f"{_ANEW}, or free some disk space"
    if known := next((kind for begin, kind in _BEGINNINGS.items() if head.startswith(begin)), None):
        return known
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head[257:262] == b"ustar":
        return _tar(path)
    if head[4:8] == b"TFL3":
        return "a model for TensorFlow Lite", "Get the weights for PyTorch"
    if head[:1] == b"\x08" and any(word in head for word in (b"pytorch", b"onnx", b"tf2onnx")):
        return "a model in ONNX", "Get the checkpoint that it was exported from"
    if _PICKLED.match(head) or is_safetensors(path):
        return None
    return _text(path, head) or (f"a file of no known kind, which begins with {head[:8]!r}", _ANEW)


def _zip(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return f"cut short: of a file of torch, the first {path.stat().st_size:,} bytes", f"{_ANEW}, or take another"
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        return "a program in TorchScript, which holds code besides its weights", _ONLY_WEIGHTS
    if any("model.json" in name or "exported_program" in name or "archive_format" in name for name in names):
        return "a program of torch.export", _ONLY_WEIGHTS
    if "data.pkl" in inside:
        return None
    if any(name.endswith(".npy") for name in names):
        return "an archive of numpy arrays", "tools/convert_checkpoint.py reads those of projects that it knows"
    if weights := [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors", ".pkl"))]:
        return f"a zip archive that holds {weights[0]}", "Unpack it"
    return f"a zip archive of other things ({', '.join(names[:3])})", _ANEW


def _tar(path: Path) -> tuple[str, str]:
    try:
        with tarfile.open(path) as archive:
            names = archive.getnames()
    except (tarfile.TarError, EOFError):
        return "a tar archive that is cut short", _ANEW
    if {"pickle", "storages", "tensors"} <= set(names):
        return "a checkpoint of torch before 0.1.10", "Load it with an old torch, and save it with torch.save anew"
    return f"a tar archive ({', '.join(names[:3])})", "Unpack it: tar xf"


def _text(path: Path, head: bytes) -> tuple[str, str] | None:
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode("utf-8-sig")  # a character was cut
    if any(not (c.isprintable() or c.isspace()) for c in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype", "<html", "<?xml", "<head", "<body", "<!--")):
        return "an HTML page: what a server shows, not the file", (
            f"{_ANEW}, from the address of the file itself (on GitHub raw, on Hugging Face resolve in place of blob)"
        )
    if start.startswith(("{", "[")):
        try:
            content = json.loads(path.read_text(errors="replace"))
        except ValueError:
            content = None
        if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
            shards = sorted(set(content["weight_map"].values()))
            return f"an index of weights in {len(shards)} files ({shards[0]}, ...)", "Get a checkpoint in one file"
        return "a JSON text", _ANEW
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"a text, which begins with {line[:40]!r}", _ANEW
