"""Read the files of benches so that a malformed row is an error that names file and row.

Every loader reads its rows through ``Record``, which checks each value where it is read: a text
where a list belongs is not taken letter by letter, a missing key is not a ``KeyError``, and a
image under a key that nobody reads is not dropped. All errors are ``BenchError``.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_vl.data.images import ImagePathError, resolve_image
from milora_vl.errors import MiloraError
from milora_vl.eval.items import ImageSource, Item

_LONGEST_MESSAGE_CHARS = 700  # a few lines: rows may hold megabytes of base64
_LONGEST_VALUE_CHARS = 80
_SHORTEST_BASE64_CHARS = 200  # longer than a file name may be, shorter than any real image


class BenchError(MiloraError, ValueError):
    """Files of a bench that cannot be used as they are; names file and row, in a few lines."""

    def __init__(self, message: str) -> None:
        """Cut a message that would fill the screen."""
        super().__init__(shorten(message, _LONGEST_MESSAGE_CHARS))


def shorten(text: str, longest: int = _LONGEST_VALUE_CHARS) -> str:
    """Return a text without its middle if it is longer than ``longest`` characters."""
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """Return a text that any UTF-8 stream takes: half a character becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _kind(value: Any) -> str:
    names = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "nothing" if is_missing(value) else "a number")


def is_missing(value: Any) -> bool:
    """Tell whether a value stands for none: null, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and value != value)


class Record:
    """One row of a bench's file, checked as it is read. A null counts as an absent key.

    A value that is absent without a default, or of another kind than the method says, is a
    ``BenchError`` that names row and key.

    Args:
        values: The row, an object.
        where: What errors name, such as "problems.json problem 5".
    """

    def __init__(self, values: Any, where: str) -> None:
        """See the class."""
        self.where = where
        if not isinstance(values, Mapping):
            raise self.error(f"an object was expected, not {_kind(values)}")
        self.values = values

    def error(self, message: str) -> BenchError:
        """Return an error that names this row."""
        return BenchError(f"{self.where}: {message}")

    def has(self, *keys: str) -> bool:
        """Tell whether there is a value under any of some keys."""
        return any(not is_missing(self.values.get(key)) for key in keys)

    def get(self, key: str) -> Any:
        """Return what is under a key, of any kind."""
        if not self.has(key):
            if key in self.values:
                raise self.error(f"key {key!r} is null")
            keys = shorten(", ".join(sorted(map(str, self.values))), 200)
            raise self.error(f"no key {key!r}; it has {keys}")
        return self.values[key]

    def text(self, key: str, default: str | None = None, *, blank: bool = False) -> str:
        """Return a text; a number counts as one.

        Args:
            key: Where it is.
            default: What an absent key means; None: it must be there.
            blank: Whether a text without a visible character will do.
        """
        if default is not None and not self.has(key):
            return default
        text = self._as_text(self.get(key), key)
        if not blank and not text.strip():
            raise self.error(f"key {key!r} is empty")
        return text

    def texts(self, key: str, default: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return a list of texts and numbers, some of which may be blank."""
        if default is not None and not self.has(key):
            return tuple(default)
        places = enumerate(self._list(key))
        return tuple(self._as_text(value, f"{key}[{place}]") for place, value in places)

    def records(self, key: str) -> list["Record"]:
        """Return a list of objects, each named by its place in errors."""
        places = enumerate(self._list(key))
        return [Record(value, f"{self.where} {key}[{place}]") for place, value in places]

    def object(self, key: str) -> "Record":
        """Return an object below a key; an absent one is empty."""
        return Record(self.values[key] if self.has(key) else {}, f"{self.where} {key}")

    def _list(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, (list, tuple)):
            raise self.error(f"key {key!r}: a list was expected, not {self._shown(value)}")
        return list(value)

    def _as_text(self, value: Any, key: str) -> str:
        # bool is a kind of int in Python, but "True" is not what the file says
        if isinstance(value, bool) or is_missing(value) or not isinstance(value, (str, int, float)):
            raise self.error(f"key {key!r}: a text was expected, not {self._shown(value)}")
        text = str(value)
        # quick checks first: a text may be megabytes of base64
        if not text.isascii() and not text.isprintable() and re.search("[\ud800-\udfff]", text):
            raise self.error(f"key {key!r} holds half a character (a lone surrogate)")
        return text

    def _shown(self, value: Any) -> str:
        return _kind(value) if is_missing(value) else f"{_kind(value)}: {shorten(repr(value))}"

    def image_name(self, *keys: str) -> str | None:
        """Return the one image that a row names under some keys, None if it names none.

        It is a file name, a data URI or base64 text, alone or in a list of one.
        """
        names = self.image_names(*keys)
        if len(names) > 1:
            raise self.error(
                f"{len(names)} images in {' and '.join(filter(self.has, keys))}, but a question is "
                "asked about one; join them into one image, or split the question"
            )
        return next(iter(names), None)

    def image_names(self, *keys: str) -> tuple[str, ...]:
        """Return the images that a row names under some keys, in order and each once.

        Raises:
            BenchError: If a value is of another kind than those of ``image_name``.
        """
        found: list[str] = []
        for key in keys:
            value = self.values.get(key)
            if is_missing(value) or value in ("", [], ()):
                continue
            names = list(value) if isinstance(value, (list, tuple)) else [value]
            found += [self._as_text(name, key) for name in names]
        return tuple(dict.fromkeys(found))

    def reject_other_images(self, read: Collection[str], *, has_image: bool) -> None:
        """Reject an image under a key that is not read: it would silently be left out.

        Args:
            read: Keys that are read, or known to hold no image of the question.
            has_image: Whether the row's image was found; without one also the name of a key
                tells.
        """
        for key, value in self.values.items():
            if key in read or is_missing(value):
                continue
            sounds = not has_image and re.search(r"(?i)image|img|image|photo|video", str(key))
            if holds_image(value) or (sounds and isinstance(value, (str, list, dict)) and value):
                raise self.error(
                    f"key {key!r} seems to hold an image, but it is not read; name the image "
                    "under the key that the bench's file format has for it, or remove the key"
                )


_IMAGE_NAME = re.compile(r"(?i)\S*\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif|heic)(?:\?\S*)?")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")


def holds_image(value: Any) -> bool:
    """Tell whether a value is an image: its bytes, base64, file name or address, or a list of it.

    A key "bytes" or "path" of an object counts too, which is how tables keep images.
    """
    if isinstance(value, str):
        return is_encoded(value) or bool(_IMAGE_NAME.fullmatch(value.strip()))
    if isinstance(value, Mapping):
        return any(holds_image(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_image(one) for one in value)
    return isinstance(value, bytes)


_DATA_URI = re.compile(r"(?i)\s*data:(?:image/|[^,]{0,80};base64,)")
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # PNG, JPEG, GIF, WebP


def is_encoded(name: str) -> bool:
    """Tell whether what stands for an image is a data URI or base64 text, not a file name."""
    if _DATA_URI.match(name):
        return True
    is_long = len(name) >= _SHORTEST_BASE64_CHARS or name.lstrip().startswith(_BASE64_STARTS)
    return is_long and _BASE64.fullmatch(name) is not None


def gold_letter(answer: str, options: Sequence[str], record: Record) -> str:
    """Return the letter that a label means: "B", "b", "(B)", "B.", "B. text" or an option's text.

    A capital letter alone is always that option, also where an option's text is another letter.

    Raises:
        BenchError: If the label names no option, or more than one.
    """
    letters = "ABCDEFGHIJ"[: len(options)]
    said = answer.strip()
    if len(said) == 1 and said in letters:
        return said
    named = {letter for letter, text in zip(letters, options, strict=True) if text.strip() == said}
    form = re.fullmatch(r"\(?([A-Za-z])[.):]*(?:\s+(.+))?", said, re.DOTALL)
    if form and (letter := form[1].upper()) in letters:
        # a letter with a text behind it must name the same option twice
        text = form[2]
        if text is None or text.strip() == options[letters.index(letter)].strip():
            named.add(letter)
    if len(named) != 1:
        problem = f"could mean {' or '.join(sorted(named))}" if named else "names no option"
        raise record.error(
            f"answer {shorten(repr(answer))} {problem}; a letter from A to {letters[-1:]} was "
            "expected"
        )
    return named.pop()


def check_options(options: Sequence[str], record: Record, fewest: int = 2) -> tuple[str, ...]:
    """Return the options; an error if there are too few, or more than letters."""
    if not fewest <= len(options) <= 10:
        raise record.error(f"{len(options)} choices, {fewest} to 10 are possible")
    return tuple(options)


def gold_yes_no(answer: str, record: Record, key: str) -> str:
    """Return a label "yes" or "no"; case, spaces and a final period do not matter."""
    label = answer.strip().lower().rstrip(".")
    if label not in ("yes", "no"):
        raise record.error(f"{key} {shorten(repr(answer))} is neither yes nor no")
    return label


def find_file(
    data_dir: Path,
    folders: Sequence[str],
    patterns: Sequence[str],
    accept: Callable[[str], bool] = lambda name: True,
) -> Path | None:
    """Return the one file that matches the first successful pattern, or None.

    Args:
        data_dir: Where to start.
        folders: Folders below ``data_dir``, in order of preference; "." is itself.
        patterns: Glob patterns, in order of preference.
        accept: Which file names count.

    Raises:
        BenchError: If a pattern matches several files of a folder: the choice is the user's.
    """
    for folder in folders:
        for pattern in patterns:
            found = sorted(path for path in (data_dir / folder).glob(pattern) if accept(path.name))
            if len(found) > 1:
                names = ", ".join(path.name for path in found[:5])
                raise BenchError(
                    f"{len(found)} files match {pattern} in {found[0].parent}: several files, "
                    f"{names}; name one of them with --data, or keep one in the folder"
                )
            if found:
                return found[0]
    return None


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
        BenchError: If several match.
    """
    if data_dir.is_file():
        return data_dir
    path = find_file(data_dir, names, patterns)
    # a folder of the bench's own name is taken for its own
    heads = {name.split("/")[0].lower() for name in names}
    is_own = any(head in data_dir.resolve().name.lower() for head in heads)
    here = patterns if is_own else [one for one in patterns if one.startswith("*")]
    path = path or find_file(data_dir, (".",), here)
    if path is None:
        raise FileNotFoundError(
            f"no {wanted} ({' or '.join(patterns)}) in {data_dir} or its folders {', '.join(names)}"
        )
    return path


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def read_json(path: Path, *, unique: bool = False) -> Any:
    """Read a JSON file; ``unique``: a key twice in an object is an error, since keys are ids."""
    hook = _unique_keys if unique else None
    try:
        return json.loads(read_text(path), object_pairs_hook=hook)
    except BenchError as error:
        raise error if str(path) in str(error) else BenchError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:  # also a number of more than 4,300 digits
        raise BenchError(f"{path}: not JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    reject_duplicates((key for key, _ in pairs), "an object")
    return dict(pairs)


def read_json_object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds one object; see ``read_json``."""
    value = read_json(path, unique=unique)
    if not isinstance(value, dict):
        raise BenchError(f"{path}: a JSON object was expected, not {_kind(value)}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects; empty lines are skipped."""
    rows = []
    # as bytes, where only a newline ends a line: texts may hold other line breaks
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BenchError(f"{path} line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise BenchError(
                    f"{path} line {number}: a JSON object was expected, not {_kind(row)}"
                )
            rows.append(row)
    return rows


def numbered(path: Path) -> Iterator[Record]:
    """Yield the rows of a JSONL file; errors name file and row."""
    for number, row in enumerate(read_json_lines(path), start=1):
        yield Record(row, f"{path.name} row {number}")


def by_id(path: Path, name: str) -> Iterator[tuple[str, Record]]:
    """Yield id and row of a JSON object whose keys are ids; ``name`` is what one is called."""
    for key, row in read_json_object(path, unique=True).items():
        yield key, Record(row, f"{path.name} {name} {shorten(key)}")


def reject_duplicates(ids: Iterable[Hashable], where: str) -> None:
    """Check that ids are unique; the error names the first that occurs twice."""
    seen: set[Hashable] = set()
    for one in ids:
        if one in seen:
            raise BenchError(f"{where}: id {shorten(repr(one))} occurs twice")
        seen.add(one)


def image_file(path: Path, folders: Sequence[str], record: Record, *names: str) -> ImageSource:
    """Return the image of a row, as ``find_image`` does, from folders beside the official file."""
    return find_image([path.parent / folder for folder in (*folders, ".")], record, *names)


def find_image(folders: Sequence[Path], record: Record, *names: str) -> ImageSource:
    """Return the image of a row: the first ``folder / name`` that exists, else the first candidate.

    A missing file is not an error yet: it becomes one, naming the row, when the image is read.

    Args:
        folders: In order of preference.
        record: The row, for errors.
        names: File names, in order of preference; the first may be a data URI or base64 text.

    Raises:
        BenchError: If a name is a URL, or points out of the folder.
    """
    if is_encoded(names[0]):
        return ImageSource(record.where, encoded=names[0])
    try:
        # one by one: a bench has hundreds of thousands of rows and a dozen candidates for each
        candidates = (resolve_image(folder, name) for name in names for folder in folders)
        found = next((path for path in candidates if path.is_file()), None)
        return ImageSource(record.where, path=found or resolve_image(folders[0], names[0]))
    except (ImagePathError, OSError) as error:
        raise record.error(str(error)) from error


def check_images(items: Iterable[Item], allowed: int = 0) -> None:
    """Check that images are there before a model is loaded: files exist, texts are base64.

    Rows of tables are read later, when they are needed.

    Args:
        items: Questions of one bench.
        allowed: Questions that may fail.

    Raises:
        BenchError: Naming the first row, if more questions lack an image than are allowed to.
    """
    problems: dict[Hashable, str | None] = {}
    failing = []
    for item in items:
        for source in (one for one in (item.image, *item.more_images) if one is not None):
            if (key := source.same_as()) not in problems:
                problems[key] = _image_problem(source)
            if problems[key] is not None:
                failing.append(problems[key])
                break
    if len(failing) > allowed:
        raise BenchError(f"{failing[0]} ({len(failing)} questions lack an image)")


def _image_problem(source: ImageSource) -> str | None:
    if source.path is not None:
        return None if source.path.is_file() else f"{source.where}: no image {source.path}"
    if source.fetch is not None:
        return None
    try:
        source.read()
    except ValueError as error:
        return str(error)
    return None


_OWNERS = ("lmms-lab-encoder", "lmms-lab")
"""Mirrors moved from the second to the first in 2026; a cache may still hold either name."""


MIRRORS_FOLDER = "MILORA_MIRRORS"
"""Environment variable: a folder of copies of the hub data sets, each under its name there."""


class MirrorError(MiloraError, OSError):
    """A mirror could not be loaded; the text says which, why, and what to do instead."""


@dataclass(frozen=True)
class Mirror:
    """A data set on the hub, for when no folder with official files is named.

    Attributes:
        name: Name without its owner, or with one ("MMMU/MMMU"), or a local folder of tables.
        config: Configuration, or None.
        split: Split.
    """

    name: str
    config: str | None = None
    split: str = "test"

    def open(self) -> Any:
        """Return the table (a ``datasets.Dataset``), its images as undecoded files.

        Raises:
            MirrorError: If it is neither cached nor to be downloaded.
        """
        import datasets

        copies = os.environ.get(MIRRORS_FOLDER)
        if copies and (Path(copies) / self.name).is_dir():
            return keep_encoded(self._open_copy(Path(copies) / self.name))
        has_owner = "/" in self.name or Path(self.name).exists()
        names = [self.name] if has_owner else [f"{owner}/{self.name}" for owner in _OWNERS]
        problems = []
        for name in names:
            try:
                table = datasets.load_dataset(name, self.config, split=self.split)
            except (OSError, ValueError) as error:  # every hub and cache error is one of these
                problems.append(f"{name}: {shorten(str(error).splitlines()[0], 200)}")
                continue
            return keep_encoded(table)
        raise MirrorError(
            f"the hub data set could not be loaded ({'; '.join(problems)}). Without a connection, "
            "bring the bench's official files here and name their folder with --data, or a copy of "
            f"the data set and name the folder that it is in with {MIRRORS_FOLDER}"
        )

    def _open_copy(self, folder: Path) -> Any:
        """Return the table of a local copy: the hub's files, or what ``save_to_disk`` wrote."""
        import datasets

        try:
            if (folder / "state.json").is_file():  # one split
                return datasets.load_from_disk(str(folder))
            if (folder / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(folder))[self.split]
            return datasets.load_dataset(str(folder), self.config, split=self.split)
        except (OSError, ValueError, KeyError) as error:
            reason = shorten(str(error), 200)
            raise MirrorError(
                f"{folder}: holds no split {self.split!r} of {self.name}: {reason}"
            ) from error


def keep_encoded(table: Any) -> Any:
    """Return the table with images as ``{"bytes", "path"}``, so that reading a row is cheap."""
    import datasets

    for column, feature in table.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table


def rows_without(table: Any, *columns: str) -> list[dict[str, Any]]:
    """Return all rows without the columns that hold images."""
    present = [column for column in columns if column in table.column_names]
    return table.remove_columns(present).to_list()


def table_image(
    table: Any, place: int, where: str, pick: Callable[[dict[str, Any]], Any] | None = None
) -> ImageSource:
    """Return the image of a row of a table; it is read when it is needed.

    Args:
        table: From ``Mirror.open``.
        place: Number of the row.
        where: What errors name.
        pick: Row -> image value; None: the column ``image``, which may be a list of one.
    """

    def fetch() -> bytes | None:
        row = table[place]
        value = row.get("image") if pick is None else pick(row)
        if isinstance(value, list):
            if len(value) > 1:
                raise BenchError(f"{where}: {len(value)} images in image, one is asked about")
            value = value[0] if value else None
        return None if value is None else _file_bytes(value, where)

    return ImageSource(where, fetch=fetch)


def _file_bytes(value: Any, where: str) -> bytes | None:
    """Return the bytes of an undecoded image, which a table may also name by a local path."""
    if not isinstance(value, Mapping):
        raise BenchError(f"{where}: the column image holds {_kind(value)}, not an image")
    if value.get("bytes"):
        return value["bytes"]
    return Path(value["path"]).read_bytes() if value.get("path") else None


def _reject_several_images(table: Any, bench: str) -> None:
    """Check that a column of lists of images holds one a row; their bytes are not read."""
    import pyarrow.compute

    feature = table.features.get("image")
    if getattr(feature, "feature", None) is None:
        return
    lengths = pyarrow.compute.list_value_length(table.data.column("image")).to_pylist()
    place = next((place for place, length in enumerate(lengths) if (length or 0) > 1), None)
    if place is not None:
        raise BenchError(
            f"{bench} mirror row {place}: {lengths[place]} images in image, one is asked about"
        )


def read_mirror(
    mirrors: Sequence[Mirror], bench: str, pick: Callable[[dict[str, Any]], Any] | None = None
) -> Iterator[tuple[Record, ImageSource]]:
    """Yield the rows of a bench's one mirror, each with its image, which ``pick`` may choose."""
    (mirror,) = mirrors
    table = mirror.open()
    if pick is None:
        _reject_several_images(table, bench)
    for place, row in enumerate(rows_without(table, "image")):
        where = f"{bench} mirror row {place}"
        yield Record(row, where), table_image(table, place, where, pick)
