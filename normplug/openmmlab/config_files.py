"""Reading a config file; what is wrong with it is said in a sentence that names file and line."""

import difflib
import os
import traceback
from pathlib import Path

from mmengine.config import Config

from normplug.openmmlab.data_files import some

__all__ = ["nearest", "read_config"]

_ENDINGS = (".py", ".json", ".yaml", ".yml")


def read_config(path: str | Path) -> Config:
    """Read a config file and those that it inherits from.

    Raises:
        FileNotFoundError: If the file, or one of its ``_base_``, is not there.
        ModuleNotFoundError: If it imports a package that is not installed.
        ValueError: If it cannot be read as a config: the message names the file and the line.
    """
    path = Path(path)
    _check_is_config(path)
    _check_bases(path, ())
    try:
        return Config.fromfile(path)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path} needs a package that cannot be imported: {error}. For the OpenMMLab toolkits: "
            f'pip install -e ".[openmmlab]"'
        ) from error
    except Exception as error:  # a config is a program and may raise whatever programs raise
        raise ValueError(_what_is_wrong(path, error)) from error


def nearest(name: str, known: object, limit: int = 1) -> list[str]:
    """Return the known names that look most like this one, the best first; none if nothing is like it."""
    by_lower = {text.lower(): text for text in map(str, known)}
    return [by_lower[text] for text in difflib.get_close_matches(name.lower(), by_lower, limit, cutoff=0.6)]


def _check_is_config(path: Path) -> None:
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.py"))
        raise FileNotFoundError(
            f"{path} is a folder, expected a config file" + (f": one of {some(inside, 3)} in it." if inside else ".")
        )
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        like = nearest(path.name, (file.name for file in folder.glob("*.py")))
        hint = f" Did you mean {folder / like[0]}?" if like else ""
        raise FileNotFoundError(f"There is no config {path}. Those of this project are under configs/.{hint}")
    if path.suffix not in _ENDINGS:
        raise ValueError(f"{path} is no config: the name of one ends in {', '.join(_ENDINGS)}.")


def _check_bases(path: Path, above: tuple[Path, ...]) -> None:
    """Follow ``_base_``: mmengine itself would follow a circle until the stack is full."""
    chain = (*above, path.resolve())
    if chain[-1] in above:
        circle = [file.name for file in chain[chain.index(chain[-1]) :]]
        raise ValueError(f"{chain[0]}: its _base_ leads back to itself: {' -> '.join(circle)}; expected an end.")
    try:
        bases = [Config._get_cfg_path(base, str(path))[0] for base in Config._get_base_files(str(path))]
    except Exception:  # of whatever kind, reading the config raises it again
        return
    for base in map(Path, bases):
        if not base.is_file():
            like = nearest(base.name, (file.name for file in base.parent.glob("*.py")) if base.parent.is_dir() else ())
            hint = f"; did you mean {like[0]}?" if like else ""
            raise FileNotFoundError(f"{path}: there is no file {os.path.normpath(base)} that its _base_ names{hint}")
        _check_bases(base, chain)


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Return a sentence for an exception that came out of reading a config."""
    frames = [(frame.f_code, line, frame.f_locals) for frame, line in traceback.walk_tb(error.__traceback__)]
    # Files are read within each other: the innermost one is at fault.
    reading = [names["filename"] for code, _, names in frames if code.co_name == "_file2dict" and "filename" in names]
    file = reading[-1] if reading else str(path)
    message = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, SyntaxError):
        text = (error.text or _line(file, error.lineno)).strip()
        return f"{file}, line {error.lineno}: {error.msg}, in {text!r}; expected Python."
    if isinstance(error, UnicodeDecodeError):
        return f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}); expected a config."
    if isinstance(error, FileNotFoundError):
        return f"{file}: a file that its _base_ names is not there ({message})."
    if "Duplicate key is not allowed among bases" in message:
        return f"{file}: two of its _base_ files have the same keys ({_short(message.partition('keys: ')[2])})."
    if "cannot inherit from base because" in message:
        key = message.partition("=")[0]
        return (
            f"{file}: {key} is a dict here and something else in its _base_: add _delete_=True to this dict to put it "
            f"in that place."
        )
    if file.endswith(_ENDINGS[1:]):
        return f"{file} is not {Path(file).suffix[1:]} that can be read: {message}."
    own = [line for code, line, _ in frames if code.co_filename == file]
    place = f"{file}, line {own[-1]}" if own else file
    return f"{place}: {type(error).__name__}: {message}" + (f", in {_line(file, own[-1]).strip()!r}" if own else "")


def _line(file: str, number: int | None) -> str:
    lines = Path(file).read_text(errors="replace").splitlines()
    return lines[number - 1] if number and number <= len(lines) else ""


def _short(keys: str) -> str:
    return some(sorted(key.strip(" {}'") for key in keys.split(",")))
