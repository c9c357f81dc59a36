"""Official files of the benches: where they are, and how lists and pictures are read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval.items import ImageSource, find_file, find_image


def locate(data_dir: Path, names: Sequence[str], patterns: Sequence[str], wanted: str) -> Path:
    """Return the official file of a bench: ``data_dir`` itself, or below one of its folders.

    ``data_dir`` as a folder of its own is searched last, and for a pattern without a ``*`` in
    front only if its name is one of ``names``: "val.json" may belong to anything.

    Args:
        data_dir: A file, or the folder of one bench or of several.
        names: Folders of the bench below ``data_dir``.
        patterns: Glob patterns of the file, in order of preference.
        wanted: What to say is missing.

    Raises:
        FileNotFoundError: If there is none; says what was looked for and where.
        ValueError: If several match.
    """
    if data_dir.is_file():
        return data_dir
    path = find_file(data_dir, names, patterns)
    heads = {name.split("/")[0].lower() for name in names}
    is_own = any(head in data_dir.resolve().name.lower() for head in heads)
    here = patterns if is_own else [one for one in patterns if one.startswith("*")]
    path = path or find_file(data_dir, (".",), here)
    if path is None:
        raise FileNotFoundError(
            f"no {wanted} ({' or '.join(patterns)}) in {data_dir} or its folders {', '.join(names)}"
        )
    return path


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Read a JSON file that holds a list of objects.

    Raises:
        ValueError: Naming the file, if it does not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{path}: a JSON list of objects was expected")
    return value


def picture_file(path: Path, folders: Sequence[str], where: str, *names: str) -> ImageSource:
    """Return the picture of a row: the first of ``names`` found beside ``path`` or in folders.

    Args:
        path: The official file.
        folders: Folders beside it, in order of preference.
        where: What to name in an error.
        names: File names, in order of preference.

    Raises:
        ImagePathError: If a name points out of the folder.
    """
    places = [path.parent / folder for folder in (*folders, ".")]
    return ImageSource(where, path=find_image(places, *names))
