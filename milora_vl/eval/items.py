"""Values that pass between benches, model and report: items, requests, answers, judged rows."""

import base64
import binascii
import hashlib
import json
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from milora_vl.data.images import resolve_image
from milora_vl.errors import MiloraError

T = TypeVar("T")


@dataclass(frozen=True)
class ImageSource:
    """A picture that has not been read yet: a file, base64 text or a row of a table on disk.

    Attributes:
        where: What to name in an error, such as "mmbench.tsv row 17 (index 1000017)".
        path: The file, or None.
        encoded: Base64 text of an image file, or None.
        fetch: Returns the bytes of the image file, or None; ``where`` tells two of them apart.
    """

    where: str
    path: Path | None = None
    encoded: str | None = field(default=None, repr=False)
    fetch: Callable[[], bytes | None] | None = field(default=None, repr=False, compare=False)

    def read(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            ValueError: If there is no picture or its base64 text is damaged; names the row.
            OSError: If the file cannot be read; the message names the row.
        """
        if self.path is not None:
            try:
                return self.path.read_bytes()
            except OSError as error:
                raise OSError(f"{self.where}: cannot read {self.path}: {error.strerror}") from error
        if self.fetch is not None and (content := self.fetch()) is not None:
            return content
        if self.encoded is None:
            raise ValueError(f"{self.where}: the row has no image")
        try:
            return base64.b64decode(self.encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{self.where}: the image is not valid base64: {error}") from error

    def key(self) -> str:
        """Return a hash of the image file's bytes; raises as ``read`` does."""
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class Item:
    """One question of a bench.

    Attributes:
        id: Unique within the bench.
        image: The picture, or None for a question about text alone.
        prompt: Everything the user says, without the image marker.
        answers: Right answers (a letter, yes/no, or ten people's answers); empty if not published.
        group: Items that stand or fall together, or share a picture: the unit of resampling.
        category: For the breakdown.
        options: Option texts of a lettered question, in order.
        question: The bare question, for reports.
        details: Further columns of the official file that the scoring needs.
        choices: Answers that are expected as a single token, such as "A" or "Yes".
    """

    id: str
    image: ImageSource | None
    prompt: str
    answers: tuple[str, ...]
    group: str
    category: str
    options: tuple[str, ...] = ()
    question: str = ""
    details: dict[str, Any] = field(default_factory=dict, hash=False)
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One judged answer, as kept in ``predictions.jsonl``.

    Attributes:
        id: Id of the item.
        group: Group of the item.
        category: Category of the item.
        answers: Right answers.
        text: Raw model output; None if the model failed on it, which is never the same as "".
        parsed: What the bench read out of ``text``; None if nothing.
        score: Credit between 0 and 1; a failed sample gets 0.
        well_formed: Whether the output kept to the requested form (a bare letter, yes or no).
        details: Details of the item.
    """

    id: str
    group: str
    category: str
    answers: tuple[str, ...]
    text: str | None
    parsed: str | None
    score: float
    well_formed: bool
    details: dict[str, Any] = field(default_factory=dict, hash=False)


class EvaluationError(MiloraError, RuntimeError):
    """Samples failed or lack a prediction; neither is ever scored as an empty answer."""


@dataclass(frozen=True)
class Request:
    """A question to the model.

    Attributes:
        id: Unique within one call.
        prompt: What the user says, without the image marker.
        image: The picture, or None.
        choices: Answers of a single token; one of them ends the answer at once (see ``Answerer``).
    """

    id: str
    prompt: str
    image: ImageSource | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: The decoded answer; None if the sample failed.
        n_tokens: Generated tokens, an end marker included.
        ended: Whether the model ended by itself, not at the limit; None where one of the request's
            ``choices`` was taken without asking the model what it would say next.
        error: What went wrong, or None.
        seconds: Its share of the time of its batch.
    """

    text: str | None
    n_tokens: int = 0
    ended: bool | None = False
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)


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
        ValueError: If a pattern matches several files of a folder: the choice is the user's.
    """
    for folder in folders:
        for pattern in patterns:
            found = sorted(path for path in (data_dir / folder).glob(pattern) if accept(path.name))
            if len(found) > 1:
                names = ", ".join(str(path) for path in found)
                raise ValueError(f"several files match {pattern}: {names}; keep one in the folder")
            if found:
                return found[0]
    return None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects; empty lines are skipped.

    Raises:
        ValueError: Naming file and line, if a line is not a JSON object.
    """
    rows = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number}: a JSON object was expected")
            rows.append(row)
    return rows


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        ValueError: Naming the file, if it does not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return value


def require(row: dict[str, Any], name: str, where: str) -> Any:
    """Return ``row[name]``.

    Raises:
        ValueError: Naming the row and the key, if it is absent.
    """
    if name not in row:
        raise ValueError(f"{where}: no key {name!r}; it has {', '.join(sorted(row))}")
    return row[name]


def find_image(folders: Sequence[Path], *names: str) -> Path:
    """Return the first ``folder / name`` that exists, else the first candidate.

    A missing file is not an error yet: it becomes one, naming the row, when the picture is read.

    Raises:
        ImagePathError: If a name points out of the folder.
    """
    # one by one: a bench has hundreds of thousands of rows and a dozen candidates for each
    candidates = (resolve_image(folder, name) for name in names for folder in folders)
    found = next((path for path in candidates if path.is_file()), None)
    return found or resolve_image(folders[0], names[0])


def reject_duplicates(ids: Iterable[Hashable], where: str) -> None:
    """Check that ids are unique.

    Raises:
        ValueError: Naming the first id that occurs twice.
    """
    seen: set[Hashable] = set()
    for one in ids:
        if one in seen:
            raise ValueError(f"{where}: id {one!r} occurs twice")
        seen.add(one)


def split_rows(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, list[Row]]:
    """Return rows by label, labels in alphabetical order."""
    parts: dict[str, list[Row]] = {label: [] for label in sorted(set(labels))}
    for row, label in zip(rows, labels, strict=True):
        parts[label].append(row)
    return parts


def take_sample(values: Sequence[T], n: int | None, seed: int = 0) -> list[T]:
    """Return ``n`` of ``values``, a seeded sample in the original order; all if ``n`` is None.

    A sample, since official files are sorted by category or alternate yes and no.
    """
    if n is None or n >= len(values):
        return list(values)
    chosen = random.Random(seed).sample(range(len(values)), n)
    return [values[index] for index in sorted(chosen)]
