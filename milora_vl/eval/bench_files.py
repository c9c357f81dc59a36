"""Official files of the benches: where they are, and how lists and pictures are read.

Hub mirrors of the benches, for when no folder with official files is named.

MMBench's TSV: finding it by language, reading it, and pictures that are named by another row.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from milora_vl.errors import MiloraError
from milora_vl.eval.items import ImageSource, find_file, find_image

_OWNERS = ("lmms-lab-encoder", "lmms-lab")
"""Mirrors moved from the second to the first in 2026; a cache may still hold either name."""


class MirrorError(MiloraError, OSError):
    """A mirror could not be loaded; the text says which, why, and what to do instead."""


@dataclass(frozen=True)
class Mirror:
    """A data set on the hub.

    Attributes:
        name: Name without its owner, or with one ("MMMU/MMMU"), or a local folder of tables.
        config: Configuration, or None.
        split: Split.
    """

    name: str
    config: str | None = None
    split: str = "test"

    def open(self) -> Any:
        """Return the table (a ``datasets.Dataset``), its pictures as undecoded files.

        Raises:
            MirrorError: If it is neither cached nor to be downloaded.
        """
        import datasets

        has_owner = "/" in self.name or Path(self.name).exists()
        names = [self.name] if has_owner else [f"{owner}/{self.name}" for owner in _OWNERS]
        problems = []
        for name in names:
            try:
                table = datasets.load_dataset(name, self.config, split=self.split)
            except (OSError, ValueError) as error:  # every hub and cache error is one of these
                problems.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            return keep_encoded(table)
        raise MirrorError(
            f"the hub data set could not be loaded ({'; '.join(problems)}). Without a connection, "
            "bring the bench's official files here and name their folder with --data"
        )


def keep_encoded(table: Any) -> Any:
    """Return the table with pictures as ``{"bytes", "path"}``, so that reading a row is cheap."""
    import datasets

    for column, feature in table.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table


def rows_without(table: Any, *columns: str) -> list[dict[str, Any]]:
    """Return all rows without the columns that hold pictures."""
    present = [column for column in columns if column in table.column_names]
    return table.remove_columns(present).to_list()


def picture(
    table: Any, place: int, where: str, pick: Callable[[dict[str, Any]], Any] | None = None
) -> ImageSource:
    """Return the picture of a row; it is read when it is needed.

    Args:
        table: From ``Mirror.open``.
        place: Number of the row.
        where: What to name in an error.
        pick: Row -> picture value; None: the column ``image``.
    """

    def fetch() -> bytes | None:
        row = table[place]
        value = row["image"] if pick is None else pick(row)
        return None if value is None else file_bytes(value)

    return ImageSource(where, fetch=fetch)


def file_bytes(value: Any) -> bytes | None:
    """Return the bytes of an undecoded picture, which a table may also name by a local path."""
    if value.get("bytes"):
        return value["bytes"]
    return Path(value["path"]).read_bytes() if value.get("path") else None


def read_mirror(
    mirrors: Sequence[Mirror], bench: str, pick: Callable[[dict[str, Any]], Any] | None = None
) -> Iterator[tuple[dict[str, Any], ImageSource, str]]:
    """Yield the rows of a bench's one mirror, each with its picture and what to call it in errors.

    Args:
        mirrors: The bench's ``MIRRORS``.
        bench: Name for errors.
        pick: As in ``picture``.

    Raises:
        MirrorError: If it cannot be loaded.
    """
    (mirror,) = mirrors
    table = mirror.open()
    for place, row in enumerate(rows_without(table, "image")):
        where = f"{bench} mirror row {place}"
        yield row, picture(table, place, where, pick), where


_LONGEST_REFERENCE_CHARS = 64


def find_tsv(data_dir: Path, *, chinese: bool = False) -> Path:
    """Return the TSV: ``data_dir`` itself, or the one with "mmbench" in its name in that folder.

    Args:
        data_dir: The TSV, of either language, or a folder.
        chinese: Which of a folder's files: those with ``cn`` or ``cc`` in their names, or others.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    if data_dir.is_file():
        return data_dir
    patterns = ("mmbench.tsv", "*[mM][mM][bB]ench*.tsv")
    folders = (".", "mmbench", "MMBench", *(("mmbench_cn",) if chinese else ()))
    path = find_file(data_dir, folders, patterns, lambda name: is_chinese(name) == chinese)
    if path is None:
        language = "Chinese" if chinese else "English"
        raise FileNotFoundError(f"no {language} *mmbench*.tsv in {data_dir} or its folder mmbench")
    return path


def is_chinese(name: str) -> bool:
    """Tell by its name whether a file holds the Chinese questions."""
    return bool(re.search(r"(?i)(?:^|[_-])(?:cn|cc)(?:[_.-]|$)", name))


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Return the rows without their missing values.

    Raises:
        ValueError: If a column is missing.
    """
    # Default parsing of missing values, as the official loaders do: an option "None" disappears.
    table = pd.read_csv(path, sep="\t", dtype=str)
    missing = {"index", "question", "A", "B", "image"} - set(table.columns)
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
    return [known(row) for row in table.to_dict("records")]


def known(row: Mapping[Any, Any]) -> dict[str, str]:
    """Drop missing values, which mirrors also write as the word "nan"."""
    present = {name: value for name, value in row.items() if isinstance(value, (str, int))}
    return {name: str(value) for name, value in present.items() if value != "nan"}


def resolve_image(images: Mapping[int, str | None], index: int) -> str | None:
    """Follow short "images", which are the index of the row that holds the picture."""
    seen = {index}
    image = images[index]
    while image and len(image) <= _LONGEST_REFERENCE_CHARS and image.strip().isdigit():
        target = int(image)
        if target in seen or target not in images:
            return None
        seen.add(target)
        image = images[target]
    return image


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
