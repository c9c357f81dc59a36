"""Values that pass between benches, model and report: items, requests, answers, judged rows."""

import base64
import binascii
import hashlib
import io
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from milora_vl.data.images import load_image
from milora_vl.errors import MiloraError

T = TypeVar("T")

_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")


def decode_base64(text: str) -> bytes:
    """Decode base64 text, which may be a data URI, be wrapped into lines or lack its padding.

    Raises:
        ValueError: If it is damaged.
    """
    # the head alone, since the rest may be megabytes
    head = _DATA_URI.match(text.lstrip()[:200])
    plain = "".join((text.lstrip()[head.end() :] if head else text).split()).translate(_URL_SAFE)
    plain = plain.rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the image is not valid base64: {error}") from error


@dataclass(frozen=True)
class ImageSource:
    """An image that has not been read yet: a file, base64 text or a row of a table on disk.

    Attributes:
        where: What to name in an error, such as "mmbench.tsv row 17 (index 1000017)".
        path: The file, or None.
        encoded: Base64 text of an image file, or a data URI; or None.
        fetch: Returns the bytes of the image file, or None; ``where`` tells two of them apart.
    """

    where: str
    path: Path | None = None
    encoded: str | None = field(default=None, repr=False)
    fetch: Callable[[], bytes | None] | None = field(default=None, repr=False, compare=False)

    def read(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            ValueError: If there is no image or its base64 text is damaged; names the row.
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
            return decode_base64(self.encoded)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error

    def open(self) -> Image.Image:
        """Return the image, RGB.

        Raises:
            ValueError: If it is damaged, missing or no image; names the row.
            OSError: If the file cannot be read; names the row.
        """
        data = self.read()
        try:
            return load_image(io.BytesIO(data))
        except ValueError as error:
            raise ValueError(f"{self.where}: {self.path or 'base64 image'}: {error}") from error

    def key(self) -> str:
        """Return a hash of the image file's bytes; raises as ``read`` does."""
        return hashlib.sha256(self.read()).hexdigest()

    def same_as(self) -> Any:
        """Return a value that is equal for sources of the same file, text or row of a table."""
        return self.path or self.encoded or self


@dataclass(frozen=True)
class VideoSource:
    """A video that has not been read yet.

    Attributes:
        where: What to name in an error.
        path: The file.
        span_s: Start and end of the part that the question is about, in seconds; None: all of it.
    """

    where: str
    path: Path
    span_s: tuple[float, float] | None = None

    def key(self) -> str:
        """Return a hash of the file and the part of it.

        Raises:
            OSError: If the file cannot be read; the message names the row.
        """
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise OSError(f"{self.where}: cannot read {self.path}: {error.strerror}") from error
        with file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()}@{self.span_s}"


@dataclass(frozen=True)
class Item:
    """One question of a bench.

    Attributes:
        id: Unique within the bench.
        image: The image, or None for a question about text alone.
        prompt: Everything the user says, without the image marker.
        answers: Right answers (a letter, yes/no, or ten people's answers); empty if not published.
        group: Items that stand or fall together, or share an image: the unit of resampling.
        category: For the breakdown.
        options: Option texts of a lettered question, in order.
        question: The bare question, for reports.
        details: Further columns of the official file that the scoring needs.
        choices: Answers that are expected as a single token, such as "A" or "Yes".
        more_images: Further images, in order after ``image``.
        video: A video, shown before the text; None for none.
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
    more_images: tuple[ImageSource, ...] = ()
    video: VideoSource | None = None


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
    """An evaluation that cannot give a score; what failed is never scored as an empty answer."""


class NonFiniteError(EvaluationError):
    """The model's logits are NaN or infinite: whatever token comes out of them means nothing.

    Attributes:
        row: Which row of the batch, counted from 0.
    """

    def __init__(self, message: str, row: int = 0) -> None:
        """Keep the row beside the message."""
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Request:
    """A question to the model.

    Attributes:
        id: Unique within one call.
        prompt: What the user says, without the image marker.
        image: The image, or None.
        more_images: Further images, in order after ``image``.
        video: A video, or None.
    """

    id: str
    prompt: str
    image: ImageSource | None = None
    more_images: tuple[ImageSource, ...] = ()
    video: VideoSource | None = None

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images, in order."""
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: The decoded answer; None if the sample failed.
        n_tokens: Generated tokens, an end marker included.
        ended: Whether the model ended by itself, not at the limit.
        error: What went wrong, or None.
        seconds: Its share of the time of its batch.
    """

    text: str | None
    n_tokens: int = 0
    ended: bool = False
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)


def split_rows(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, list[Row]]:
    """Return rows by label, labels in alphabetical order."""
    parts: dict[str, list[Row]] = {label: [] for label in sorted(set(labels))}
    for row, label in zip(rows, labels, strict=True):
        parts[label].append(row)
    return parts


def take_groups(items: Sequence[Item], n: int | None) -> list[Item]:
    """Return the items of ``n`` groups, a seeded sample; all if ``n`` is None."""
    kept = set(take_sample(list(dict.fromkeys(item.group for item in items)), n))
    return [item for item in items if item.group in kept]


def take_sample(values: Sequence[T], n: int | None, seed: int = 0) -> list[T]:
    """Return ``n`` of ``values``, a seeded sample in the original order; all if ``n`` is None.

    A sample, since official files are sorted by category or alternate yes and no.
    """
    if n is None or n >= len(values):
        return list(values)
    chosen = random.Random(seed).sample(range(len(values)), n)
    return [values[index] for index in sorted(chosen)]
