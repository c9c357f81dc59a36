"""Hub mirrors of the benches, for when no folder with official files is named."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_vl.eval.items import ImageSource

_OWNERS = ("lmms-lab-encoder", "lmms-lab")
"""Mirrors moved from the second to the first in 2026; a cache may still hold either name."""


class MirrorError(OSError):
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
