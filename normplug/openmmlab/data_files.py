"""Annotation files as mmdet and mmaction2 read them, and errors that say what is wrong with one."""

import json
from pathlib import Path
from typing import Any

__all__ = ["classes_of", "read_coco", "read_list"]


def read_coco(file: Path) -> dict:
    """Read a file in COCO's form.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is no json ({error}). Expected annotations in COCO's form.") from error
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(_get(content, key), list)]
    if missing:
        raise ValueError(
            f"{file} is not in COCO's form: it has no list {', '.join(missing)}. Expected a dict with images, "
            f"annotations and categories."
        )
    return content


def _get(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def classes_of(content: dict) -> tuple[str, ...]:
    """Return the class names of a COCO file, in the file's order, which is that of mmdet's labels.

    Roboflow's first category is the name of the project, the others' supercategory: it is no class.
    """
    used = {annotation["category_id"] for annotation in content["annotations"]}
    parents = {category.get("supercategory") for category in content["categories"]}
    return tuple(
        category["name"]
        for category in content["categories"]
        if category["id"] in used or category["name"] not in parents
    )


def read_list(file: Path) -> list[tuple[str, int]]:
    """Read a list of videos, lines of a path and a label with one space between.

    Raises:
        ValueError: If a line is something else.
    """
    found = []
    for i, line in enumerate(file.read_text().splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        if not path or " " in path or not label.isdecimal():
            hint = (
                "has a comma" if "," in line else "has a space in the path" if " " in path else "has no label 0, 1, ..."
            )
            raise ValueError(
                f"{file}, line {i}: {line.strip()!r} {hint}. Expected 'path label', a path without spaces, one space, "
                f"and the number of the class from 0."
            )
        found.append((path, int(label)))
    return found
