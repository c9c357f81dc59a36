"""LLaVA JSON, "messages" or instruction records -> validated ``Conversation`` objects.

Accepted: a JSON list, or JSON Lines. A record holds its turns under ``conversations``
(``{"from": "human"|"gpt"|"system", "value": …}``) or ``messages`` (``{"role": …, "content": …}``,
content a text or a list of text and image parts), and its pictures under ``image`` or ``images``
(a name or a list of names, relative to the image folder). A record with ``instruction`` and
``output`` (Alpaca) is one exchange without pictures; its ``input``, if any, follows the instruction
under the heading that Alpaca's prompt has for it.

Three of LLaVA's own rules are kept: turns before the first question are left out, a question with
exactly one image mark gets it moved to its start, and nothing is fetched from the network.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.images import ImagePathError, resolve_image

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
        reason: A few fixed words, for counting.
    """

    def __init__(self, where: str, reason: str, detail: str) -> None:
        """Build the message from the place, the reason and what was found."""
        super().__init__(f"{where}: {reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: Who speaks.
        text: In a question ``IMAGE_TOKEN`` stands where an image belongs and ``IMAGE_TEXT`` where
            the record means these characters; in other turns all text is text.
        supervised: Whether an answer is learned; its text is context either way.
    """

    role: Role
    text: str
    supervised: bool = True


@dataclass(frozen=True)
class Conversation:
    """A validated record.

    Attributes:
        id: The record's id, or its position.
        turns: An optional system turn, then user and assistant in alternation, an answer last.
        images: Names relative to the image folder, one for each image mark, in order.
        where: File and record, for messages: ``train.json[17]`` or ``train.jsonl line 18``.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    where: str = ""


def read_records(
    path: Path | str,
    image_folder: Path | str | None,
    on_bad: Literal["error", "skip"] = "error",
) -> tuple[list[Conversation], Counter[str]]:
    """Read and validate a file of conversations.

    Args:
        path: A JSON list or a JSON Lines file, UTF-8.
        image_folder: Where image names start; names must exist there. None: files are not looked
            for (names are still checked to be relative).
        on_bad: Raise at the first bad record, or leave bad records out and count them.

    Returns:
        The conversations in file order, and how many were left out for which reason.

    Raises:
        ValueError: If the file is not JSON (with line and column), holds no usable record, or, with
            ``on_bad="error"``, a record is bad (``RecordError``, naming file and record).
        OSError: If the file cannot be read.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad must be "error" or "skip", not {on_bad!r}')
    path = Path(path)
    folder = None if image_folder is None else Path(image_folder)
    conversations: list[Conversation] = []
    skipped: Counter[str] = Counter()
    for where, index, record in _iterate_records(path):
        try:
            if isinstance(record, RecordError):
                raise record
            conversation = parse_record(record, where, default_id=str(index))
            _check_images(conversation, folder)
        except RecordError as error:
            if on_bad == "error":
                raise
            skipped[error.reason] += 1
        else:
            conversations.append(conversation)
    if not conversations:
        raise ValueError(f"{path}: no usable record; left out: {dict(skipped) or 'none'}")
    return conversations, skipped


def parse_record(record: Any, where: str, default_id: str = "") -> Conversation:
    """Validate one decoded record; image files are not looked for.

    Args:
        record: A decoded JSON value.
        where: File and record, for messages.
        default_id: The id of a record without one.

    Raises:
        RecordError: If the record is malformed; the message starts with ``where``.
    """
    if not isinstance(record, dict):
        raise RecordError(where, "not an object", f"got {type(record).__name__}")
    if "instruction" in record and "output" in record:
        record = _as_conversation(record, where)
    key = "conversations" if "conversations" in record else "messages"
    entries = record.get(key)
    if not isinstance(entries, list) or not entries:
        raise RecordError(where, "no turns", 'needs a list under "conversations" or "messages"')
    outer_names = _read_image_names(record, where)
    inner_names: list[str] = []
    turns: list[Turn] = []
    for position, entry in enumerate(entries):
        role, text, names = _read_turn(entry, f"{where} turn {position}")
        if role == "assistant" and not any(turn.role == "user" for turn in turns):
            continue
        inner_names += names
        if role == "user" and text.count(IMAGE_TOKEN) == 1:
            text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
        turns.append(Turn(role, text))
    if outer_names and inner_names:
        raise RecordError(where, "bad image field", "images are named in the record and in a turn")
    images = outer_names or inner_names
    _check_turns(turns, len(images), where)
    return Conversation(str(record.get("id", default_id)), tuple(turns), tuple(images), where)


def _as_conversation(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Turn an instruction record into a LLaVA record."""
    parts = {name: record.get(name) or "" for name in ("instruction", "input", "output")}
    wrong = [name for name, value in parts.items() if not isinstance(value, str)]
    if wrong or not parts["instruction"].strip():
        raise RecordError(where, "bad instruction", f"needs text in {wrong or ['instruction']}")
    question = parts["instruction"]
    if parts["input"].strip():
        question = f"{question}\n\n### Input:\n{parts['input']}"
    # an image mark in a text-only record is text that happens to look like one
    question, answer = (
        text.replace(IMAGE_TOKEN, IMAGE_TOKEN[1:-1]) for text in (question, parts["output"])
    )
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    named = {"id": record["id"]} if "id" in record else {}
    return {**named, "conversations": turns}


def _iterate_records(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Yield (where, index, decoded record or RecordError) of a JSON list or JSON Lines file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    if text.lstrip()[:1] == "[" and path.suffix != ".jsonl":
        try:
            records = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: malformed JSON: {error}") from error
        for index, record in enumerate(records):
            yield f"{path}[{index}]", index, record
        return
    index = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            record = RecordError(where, "malformed JSON", str(error))
        yield where, index, record
        index += 1


def _read_image_names(record: dict[str, Any], where: str) -> list[str]:
    if "image" in record and "images" in record:
        raise RecordError(where, "bad image field", 'both "image" and "images" are given')
    value = record.get("image", record.get("images"))
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RecordError(
            where, "bad image field", f"needs a name or a list of names, got {value!r}"
        )
    return list(names)


def _read_turn(entry: Any, where: str) -> tuple[Role, str, list[str]]:
    """Return role, text with image marks, and the image names given inside the turn."""
    if not isinstance(entry, dict):
        raise RecordError(where, "bad turn", f"needs an object, got {type(entry).__name__}")
    speaker = entry.get("from", entry.get("role"))
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RecordError(where, "unknown role", f"{speaker!r} is none of {', '.join(_ROLES)}")
    content = entry.get("value", entry.get("content"))
    if isinstance(content, str):
        return _ROLES[speaker], content, []
    if not isinstance(content, list):
        raise RecordError(where, "bad turn", f"needs text, got {type(content).__name__}")
    texts: list[str] = []
    names: list[str] = []
    for part in content:
        text, name = _read_part(part, where)
        texts.append(text)
        names += [name] if name else []
    return _ROLES[speaker], "\n".join(texts), names


def _read_part(part: Any, where: str) -> tuple[str, str | None]:
    """Return the text (a mark, for an image) and the image name if the part gives one."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], None
    if kind in ("image", "image_url"):
        source = part.get("image_url", part.get("image", part.get("path", part.get("url"))))
        name = source.get("url") if isinstance(source, dict) else source
        if name is None or (isinstance(name, str) and name):
            return IMAGE_TOKEN, name
    raise RecordError(where, "bad turn", f"cannot read the content part {str(part)[:80]!r}")


def _check_turns(turns: list[Turn], n_images: int, where: str) -> None:
    dialogue = turns[1:] if turns and turns[0].role == "system" else turns
    for position, turn in enumerate(dialogue):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise RecordError(
                where, "turns do not alternate", f"{turn.role!r} stands where {expected!r} belongs"
            )
        if turn.role == "assistant" and not turn.text.strip():
            raise RecordError(where, "empty answer", f"answer {position // 2} has no text")
    if len(dialogue) < 2 or len(dialogue) % 2:
        raise RecordError(where, "no answer", "the last turn must be the assistant's")
    marks = sum(turn.text.count(IMAGE_TOKEN) for turn in dialogue if turn.role == "user")
    misplaced = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role != "user")
    if misplaced:
        raise RecordError(where, "image mark outside a question", f"{misplaced} {IMAGE_TOKEN}")
    if marks > n_images:
        raise RecordError(
            where, "more image marks than images", f"{marks} {IMAGE_TOKEN} marks, {n_images} images"
        )
    if marks < n_images:
        raise RecordError(
            where,
            "more images than image marks",
            f"{n_images} images, {marks} {IMAGE_TOKEN} marks; put one mark for each image",
        )


def _check_images(conversation: Conversation, folder: Path | None) -> None:
    for name in conversation.images:
        try:
            image_path = resolve_image(folder or Path(), name)
        except ImagePathError as error:
            raise RecordError(conversation.where, "bad image path", str(error)) from error
        if folder is not None and not image_path.is_file():
            raise RecordError(conversation.where, "image file missing", str(image_path))
