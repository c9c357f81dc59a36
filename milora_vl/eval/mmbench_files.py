"""MMBench's TSV: finding it by language, reading it, and pictures that are named by another row."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from milora_vl.eval.items import find_file

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
