"""Records in the field's formats -> validated ``Conversation`` objects.

A file is a JSON list or JSON Lines. A record holds turns under ``conversations`` (LLaVA, ShareGPT)
or ``messages`` (OpenAI, TRL, ms-swift, LLaMA-Factory), or one exchange under ``instruction`` and
``output`` (Alpaca), ``query`` and ``response`` (ms-swift) or ``prompt`` and ``completion`` (TRL).
``record_keys`` says what every key means. An unknown key is an error, so that no content is lost
unnoticed. Null and an empty text, list or object mean that a key is absent, because tables with a
fixed schema write every key into every record.

LLaVA's own rules hold: answers before the first question are dropped, the only image mark of a
question moves to its start, and nothing is fetched from the network. A content list is taken as it
is: images where their parts are, texts unchanged.
"""

import json
import logging
import reprlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from milora_vl.config import nearest
from milora_vl.constants import IMAGE_TEXT, IMAGE_TOKEN, VIDEO_TEXT, VIDEO_TOKEN
from milora_vl.data.images import ImagePathError, resolve_image
from milora_vl.data.record_keys import (
    ANSWERS,
    IMAGE_SOURCES,
    IMAGES,
    LOSS_SWITCHES,
    PART_KEYS,
    QUESTIONS,
    RECORD_KEYS,
    SYSTEMS,
    TURN_KEYS,
    TURN_LISTS,
    UNREAD_ROLES,
    VIDEO_SOURCES,
    VIDEOS,
    Key,
    find_key,
)
from milora_vl.errors import MiloraError

logger = logging.getLogger(__name__)

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_PART_TYPES = {
    "text": ("", ()),
    "image": (IMAGE_TOKEN, IMAGE_SOURCES),
    "image_url": (IMAGE_TOKEN, IMAGE_SOURCES),
    "video": (VIDEO_TOKEN, VIDEO_SOURCES),
    "video_url": (VIDEO_TOKEN, VIDEO_SOURCES),
}
_WAYS_OUT = (
    "remove or rename the key, list it in data.ignore_keys to ignore it in all records, or "
    "set data.on_bad_record: skip to skip such records"
)
_EMPTY_JSON = ("[]", "{}", "null")  # LLaMA-Factory writes "tools" as JSON inside JSON
_EARLY_ANSWER = "answers before the first question"


class DataError(MiloraError, ValueError):
    """A file of records that is missing or cannot be read, or a data set without a sample."""


class RecordError(DataError):
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
        text: In a question ``IMAGE_TOKEN`` stands where an image belongs, ``VIDEO_TOKEN`` where a
            video does and ``IMAGE_TEXT`` where the record means the characters of the image mark;
            in other turns all text is text.
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
        videos: The same for videos.
        where: File and record, for messages: ``train.json[17]`` or ``train.jsonl line 18``.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    where: str = ""
    videos: tuple[str, ...] = ()


class _TwiceWritten(dict):
    """A JSON object with a key written twice, of which ``json`` would keep the last."""


def read_records(
    path: Path | str,
    image_folder: Path | str | None,
    on_bad: Literal["error", "skip"] = "error",
    ignore_keys: Collection[str] = (),
    must_exist: bool = True,
) -> tuple[list[Conversation], Counter[str]]:
    """Read and validate a file of conversations.

    Ignored keys are logged once, with the number of records that have each.

    Args:
        path: A JSON list or a JSON Lines file, UTF-8.
        image_folder: Where image names start. None: files are not looked for (names are still
            checked to be relative).
        on_bad: Raise at the first bad record, or skip and count bad records.
        ignore_keys: Keys to ignore, whatever ``record_keys`` says of them.
        must_exist: Whether a missing image makes its record bad. With False whoever reads the
            images finds out.

    Returns:
        The conversations in file order, and the number of skipped records by reason.

    Raises:
        DataError: If the file is not JSON (with line and column), holds no usable record, or, with
            ``on_bad="error"``, a record is bad (``RecordError``, naming file and record).
        OSError: If the file cannot be read.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad must be "error" or "skip", not {on_bad!r}')
    path = Path(path)
    folder = None if image_folder is None else Path(image_folder)
    conversations: list[Conversation] = []
    skipped: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for where, index, record in _iterate_records(path):
        unread: set[str] = set()
        try:
            if isinstance(record, RecordError):
                raise record
            conversation = parse_record(record, where, str(index), ignore_keys, unread)
            _check_images(conversation, folder, must_exist)
        except RecordError as error:
            if on_bad == "error":
                raise
            skipped[error.reason] += 1
        else:
            conversations.append(conversation)
            ignored.update(unread)
    if not conversations:
        raise DataError(f"{path}: no usable record; skipped: {dict(skipped) or 'none'}")
    if ignored:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(ignored.items()))
        logger.warning(
            "%s: ignored, with the number of records of %d: %s", path, len(conversations), names
        )
    return conversations, skipped


def parse_record(
    record: Any,
    where: str,
    default_id: str = "",
    ignore_keys: Collection[str] = (),
    ignored: set[str] | None = None,
) -> Conversation:
    """Validate one decoded record; image files are not looked for.

    Args:
        record: A decoded JSON value.
        where: File and record, for messages.
        default_id: The id of a record without one.
        ignore_keys: Keys to ignore.
        ignored: Gets the names of the record's ignored keys.

    Raises:
        RecordError: If the record is malformed; the message starts with ``where``.
    """
    reader = _Reader(where, frozenset(ignore_keys), set() if ignored is None else ignored)
    try:
        return reader.read(record, default_id)
    except RecursionError as error:
        raise RecordError(where, "bad turn", "lists or objects are nested too deeply") from error


def _iterate_records(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Yield (where, index, decoded record or RecordError) of a JSON list or JSON Lines file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    # a line of JSON Lines may be a list too, and is then one bad record
    if text.lstrip()[:1] == "[" and path.suffix != ".jsonl":
        try:
            records = json.loads(text, object_pairs_hook=_build_object)
        except (ValueError, RecursionError) as error:  # ValueError: also a number without end
            raise DataError(f"{path}: malformed JSON: {error}") from error
        for index, record in enumerate(records):
            yield f"{path}[{index}]", index, record
        return
    index = 0
    # not splitlines: it also splits at U+2028 and other characters inside texts
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_build_object)
        except (ValueError, RecursionError) as error:
            record = RecordError(where, "malformed JSON", str(error))
        yield where, index, record
        index += 1


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    return built if len(built) == len(pairs) else _TwiceWritten(built)


def _is_absent(value: Any) -> bool:
    """Whether a value is null or empty, or holds nothing but such values."""
    if isinstance(value, dict):
        return all(map(_is_absent, value.values()))
    if isinstance(value, list):
        return all(map(_is_absent, value))
    return value is None or (isinstance(value, str) and not value)


@dataclass(frozen=True)
class _Message:
    """A turn together with the images and videos that it names itself."""

    turn: Turn
    names: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()


class _Reader:
    """Reads one record.

    Args:
        where: File and record, for messages.
        ignore_keys: Keys that the user wants ignored.
        ignored: Gets the names of all ignored keys.
    """

    def __init__(self, where: str, ignore_keys: frozenset[str], ignored: set[str]) -> None:
        self.where = where
        self.ignore_keys = ignore_keys
        self.ignored = ignored

    def read(self, record: Any, default_id: str) -> Conversation:
        """Return the conversation of a record."""
        if not isinstance(record, dict):
            raise RecordError(self.where, "not an object", f"got {type(record).__name__}")
        fields = self._fields(record, RECORD_KEYS, self.where)
        if not isinstance(fields.get("objects", []), list):
            detail = f"'objects' as ms-swift writes them (ref, bbox) are not read; {_WAYS_OUT}"
            raise RecordError(self.where, "unsupported key", detail)
        # files are named once: by the record or by its turns
        outer_images = self._record_files(fields, IMAGES)
        outer_videos = self._record_files(fields, VIDEOS)
        messages = self._messages(fields, bool(outer_images), bool(outer_videos))
        images = self._one_level(outer_images, [name for one in messages for name in one.names])
        videos = self._one_level(outer_videos, [name for one in messages for name in one.videos])
        turns = self._with_system(fields, [message.turn for message in messages])
        if outer_videos:
            turns = _mark_videos(turns, bool(images))
        _check_turns(turns, self.where)
        _check_marks(turns, IMAGE_TOKEN, len(images), "image", self.where)
        _check_marks(turns, VIDEO_TOKEN, len(videos), "video", self.where)
        name = self._id(fields.get("id", default_id))
        return Conversation(name, tuple(turns), tuple(images), self.where, tuple(videos))

    def _one_level(self, outer: list[str], inner: list[str]) -> list[str]:
        if outer and inner:
            raise RecordError(
                self.where, "bad image field", "files are named in the record and in a turn"
            )
        return outer or inner

    # --- keys and values --------------------------------------------------------------------------

    def _fields(self, entry: dict[Any, Any], level: dict[str, Key], at: str) -> dict[str, Any]:
        """Return the keys to read that are not absent; refuse unknown and unsupported ones."""
        if isinstance(entry, _TwiceWritten):
            raise RecordError(at, "malformed JSON", "an object has a key twice")
        fields = {}
        for name, value in entry.items():
            if _is_absent(value):
                continue
            if name in self.ignore_keys:
                self.ignored.add(name)
                continue
            key = find_key(str(name), level)
            if key is None:
                names = (known for known, row in level.items() if row.use == "read")
                hint = nearest(str(name), names, "docs/data.md has the known ones")
                raise RecordError(at, "unknown key", f"{_show(name)} ({hint}); {_WAYS_OUT}")
            if key.use == "refused" and value not in _EMPTY_JSON:
                detail = f"{name!r}: {key.meaning}; {_WAYS_OUT}"
                raise RecordError(at, "unsupported key", detail)
            if key.use == "ignored":
                self.ignored.add(name)
            if key.use == "read":
                fields[name] = value
        return fields

    def _text(self, value: Any, at: str, reason: str = "bad turn", has_marks: bool = True) -> str:
        """Return a valid text; with ``has_marks`` false, ``<image>`` in it is escaped."""
        if not isinstance(value, str):
            raise RecordError(at, reason, f"needs text, got {type(value).__name__}")
        # JSON can hold half of a surrogate pair, on which tokenizers raise a TypeError
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            detail = f"half of a character (a lone surrogate) at position {error.start}"
            raise RecordError(at, "not Unicode text", detail) from error
        if IMAGE_TEXT in value or VIDEO_TOKEN in value:  # ours: they would turn into marks
            raise RecordError(at, "not Unicode text", "U+FDD0 or U+FDD1 inside a mark")
        return value if has_marks else value.replace(IMAGE_TOKEN, IMAGE_TEXT)

    def _one_of(self, fields: dict[str, Any], names: tuple[str, ...], reason: str, at: str) -> Any:
        """Return the value under the one name that is present, or None."""
        found = [name for name in names if name in fields]
        if len(found) > 1 and any(fields[name] != fields[found[0]] for name in found):
            detail = f"{' and '.join(found)} are both given and differ; {_WAYS_OUT}"
            raise RecordError(at, reason, detail)
        return fields[found[0]] if found else None

    def _id(self, value: Any) -> str:
        if isinstance(value, str):
            return self._text(value, self.where, "bad id")
        if isinstance(value, int | float) and abs(value) < 1e100:  # not infinite, and can be shown
            return str(value)
        raise RecordError(self.where, "bad id", f"needs a text or number, got {_show(value)}")

    # --- images -----------------------------------------------------------------------------------

    def _record_files(self, fields: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
        found = [name for name in keys if name in fields]
        if len(found) > 1:
            raise RecordError(
                self.where, "bad image field", f"both {found[0]!r} and {found[1]!r} are given"
            )
        return self._image_names(fields[found[0]], self.where) if found else []

    def _image_names(self, value: Any, at: str) -> list[str]:
        """Return the names in an image field: one or a list, each a text or an object."""
        values = value if isinstance(value, list) else [value]
        return [self._image_name(one, at) for one in values if not _is_absent(one)]

    def _image_name(self, value: Any, at: str, reason: str = "bad image field") -> str:
        if isinstance(value, dict):
            fields = self._fields(value, PART_KEYS, at)
            value = self._one_of(fields, IMAGE_SOURCES, reason, at)
        if not isinstance(value, str):
            detail = f"needs a name or a list of names, got {_show(value)}"
            raise RecordError(at, reason, detail)
        return self._text(value, at, reason)

    # --- turns ------------------------------------------------------------------------------------

    def _messages(
        self, fields: dict[str, Any], has_images: bool, has_videos: bool
    ) -> list[_Message]:
        """Return all turns but the record's own system text, whatever the format."""
        lists = [name for name in TURN_LISTS if name in fields]
        single = [name for name in (*QUESTIONS, *ANSWERS, "input", "history") if name in fields]
        if len(lists) > 1 or (lists and single):
            first, second = (lists + single)[:2]
            detail = f"{first!r} beside {second!r}: only one of them can count; {_WAYS_OUT}"
            raise RecordError(self.where, "two conversations", detail)
        if single:
            # TRL writes texts or lists of messages under the same two names
            if any(isinstance(fields.get(name), list) for name in ("prompt", "completion")):
                return self._prompt_and_completion(fields)
            return self._one_exchange(fields, has_images, has_videos)
        entries = fields.get(lists[0]) if lists else None
        if not isinstance(entries, list):
            raise RecordError(
                self.where, "no turns", 'needs a list under "conversations" or "messages"'
            )
        return self._turn_list(entries, self.where)

    def _turn_list(self, entries: list[Any], at: str) -> list[_Message]:
        messages: list[_Message] = []
        for position, entry in enumerate(entries):
            if _is_absent(entry):
                continue
            message = self._turn(entry, f"{at} turn {position}")
            asked = any(earlier.turn.role == "user" for earlier in messages)
            if message.turn.role == "assistant" and not asked:
                self.ignored.add(_EARLY_ANSWER)
                continue
            messages.append(message)
        return messages

    def _turn(self, entry: Any, at: str) -> _Message:
        if not isinstance(entry, dict):
            raise RecordError(at, "bad turn", f"needs an object, got {type(entry).__name__}")
        fields = self._fields(entry, TURN_KEYS, at)
        role = self._role(fields, at)
        content = self._one_of(fields, ("value", "content"), "bad turn", at)
        if content is None:  # an empty text counts as absent above, but here it is a text
            content = next((entry.get(k) for k in ("value", "content") if entry.get(k) == ""), None)
        if isinstance(content, list):
            text, names, videos = self._parts(content, role, at)
        else:
            text, names, videos = _move_one_mark(self._text(content, at), role), [], []
        # images that the turn names beside its text: at its marks, or in front
        own = self._image_names(fields.get("image", []), at)
        own += self._image_names(fields.get("images", []), at)
        if own and names:
            raise RecordError(at, "bad image field", "images are named in the turn and in its text")
        if own and role == "user" and IMAGE_TOKEN not in text:
            text = f"{IMAGE_TOKEN}\n" * len(own) + text
        if own and (role != "user" or text.count(IMAGE_TOKEN) != len(own)):
            raise RecordError(at, "bad image field", f"{len(own)} images do not fit into its text")
        turn = Turn(role, text, self._is_learned(fields, role, at))
        return _Message(turn, (*names, *own), tuple(videos))

    def _role(self, fields: dict[str, Any], at: str) -> Role:
        roles = set()
        for name in ("from", "role"):
            if name in fields:
                speaker = fields[name]
                word = speaker.strip().lower() if isinstance(speaker, str) else None
                if word in UNREAD_ROLES:
                    raise RecordError(at, "unsupported role", f"{word!r}: tool calls are not read")
                if word not in _ROLES:
                    detail = f"{_show(speaker)} is none of {', '.join(_ROLES)}"
                    raise RecordError(at, "unknown role", detail)
                roles.add(_ROLES[word])
        if len(roles) != 1:  # no speaker, or two that contradict each other
            detail = '"from" and "role" differ' if roles else 'needs "from" or "role"'
            raise RecordError(at, "unknown role", detail)
        return roles.pop()

    def _is_learned(self, fields: dict[str, Any], role: Role, at: str) -> bool:
        """Read the switches of a turn: true and false, or the weights 1 and 0."""
        values = {name: fields[name] for name in LOSS_SWITCHES if name in fields}
        for name, value in values.items():
            # a weight between 0 and 1 would have to scale the loss
            if not isinstance(value, int | float) or value not in (0, 1):
                detail = f"{name!r} is {_show(value)}; needs true, false, 1 or 0"
                raise RecordError(at, "bad loss switch", detail)
            if role != "assistant" and value and name != "weight":
                raise RecordError(at, "bad loss switch", f"{name!r}: only answers are learned")
        if len({bool(value) for value in values.values()}) > 1:
            raise RecordError(
                at, "bad loss switch", f"{' and '.join(values)} contradict each other"
            )
        return role != "assistant" or all(values.values())

    def _parts(self, parts: list[Any], role: Role, at: str) -> tuple[str, list[str], list[str]]:
        """Join a content list: texts as they are, a mark for each image and video, their names."""
        texts: list[str] = []
        names: dict[str, list[str]] = {IMAGE_TOKEN: [], VIDEO_TOKEN: []}
        present = [part for part in parts if not _is_absent(part)]
        for position, part in enumerate(present):
            if not isinstance(part, dict):
                raise RecordError(at, "bad turn", f"cannot read the content part {_show(part)}")
            fields = self._fields(part, PART_KEYS, at)
            named = [name for name in (*IMAGE_SOURCES, *VIDEO_SOURCES) if name in fields]
            kind = "text" if not named else "video" if "video" in named[-1] else "image"
            mark, sources = _PART_TYPES.get(str(fields.get("type", kind)), (None, ()))
            if mark is None or not {*named} <= {*sources} or (mark and "text" in fields):
                raise RecordError(at, "bad turn", f"cannot read the content part {_show(part)}")
            if not mark:
                texts.append(self._text(fields.get("text", ""), at, has_marks=role != "user"))
                continue
            if role != "user":
                raise RecordError(at, "image mark outside a question", f"{kind} in a {role} turn")
            # the line break is part of the mark, as in LLaVA; styles put their own frame there
            texts.append(f"{mark}\n" if position + 1 < len(present) else mark)
            if named:
                source = self._one_of(fields, sources, "bad turn", at)
                names[mark].append(self._image_name(source, at, "bad turn"))
        return "".join(texts), names[IMAGE_TOKEN], names[VIDEO_TOKEN]

    # --- records with one exchange ----------------------------------------------------------------

    def _one_exchange(
        self, fields: dict[str, Any], has_images: bool, has_videos: bool
    ) -> list[_Message]:
        """Return the turns of an instruction record, those of its history first.

        Its texts hold image marks only if the record names images; else they stand for themselves.
        """

        def text(value: Any, has_marks: bool = has_images) -> str:
            return self._text(value, self.where, "bad instruction", has_marks)

        question = self._only(fields, QUESTIONS)
        more = fields.get("input", "")
        if question and more and "instruction" not in fields:
            raise RecordError(self.where, "bad instruction", '"input" belongs to "instruction"')
        if not question and not more:
            raise RecordError(self.where, "bad instruction", f"needs one of {', '.join(QUESTIONS)}")
        # tables with a fixed schema write questions without an instruction under "input"
        asked = text(question or more)
        if question and text(more).strip():
            asked = f"{asked}\n\n### Input:\n{text(more)}"
        if not asked.strip():
            raise RecordError(self.where, "bad instruction", "the question has no text")
        exchanges = [(text(q), text(a, True)) for q, a in self._history(fields.get("history", []))]
        exchanges.append((asked, text(self._only(fields, ANSWERS) or "", True)))
        if has_images and not any(IMAGE_TOKEN in question for question, _ in exchanges):
            question, answer = exchanges[0]
            count = len(self._record_files(fields, IMAGES))
            exchanges[0] = (f"{IMAGE_TOKEN}\n" * count + question, answer)
        if has_videos and not any(VIDEO_TEXT in question for question, _ in exchanges):
            question, answer = exchanges[0]
            count = len(self._record_files(fields, VIDEOS))
            exchanges[0] = (f"{VIDEO_TEXT}\n" * count + question, answer)
        turns = [
            turn
            for question, answer in exchanges
            for turn in (Turn("user", _move_one_mark(question, "user")), Turn("assistant", answer))
        ]
        return [_Message(turn) for turn in turns]

    def _only(self, fields: dict[str, Any], names: tuple[str, ...]) -> Any:
        found = [name for name in names if name in fields]
        if len(found) > 1:
            detail = f"{' and '.join(found)} are both given; {_WAYS_OUT}"
            raise RecordError(self.where, "two conversations", detail)
        return fields[found[0]] if found else None

    def _history(self, pairs: Any) -> list[tuple[Any, Any]]:
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in pairs
        ):
            detail = "history needs a list of [question, answer]"
            raise RecordError(self.where, "bad instruction", detail)
        return [(question, answer) for question, answer in pairs]

    def _prompt_and_completion(self, fields: dict[str, Any]) -> list[_Message]:
        """Return the turns of TRL's conversational form; answers in the prompt are context."""
        lists = [fields.get(name) for name in ("prompt", "completion")]
        others = [name for name in (*QUESTIONS, *ANSWERS, "input", "history") if name in fields]
        if not all(isinstance(one, list) for one in lists) or len(others) > 2:
            detail = '"prompt" and "completion" must both be lists of messages, or both texts'
            raise RecordError(self.where, "bad instruction", detail)
        prompt = self._turn_list(lists[0], f"{self.where} prompt")
        prompt = [replace(one, turn=replace(one.turn, supervised=False)) for one in prompt]
        answers = [
            self._turn(entry, f"{self.where} completion turn {position}")
            for position, entry in enumerate(lists[1])
        ]
        return prompt + answers

    def _with_system(self, fields: dict[str, Any], turns: list[Turn]) -> list[Turn]:
        """Put the record's system text before its turns."""
        value = self._one_of(fields, SYSTEMS, "bad system text", self.where)
        if value is None:
            return turns
        text = self._text(value, self.where, "bad system text")
        if turns and turns[0].role == "system":
            if turns[0].text != text:
                detail = f"the record's own differs from that of its first turn; {_WAYS_OUT}"
                raise RecordError(self.where, "bad system text", detail)
            return turns
        return [Turn("system", text), *turns]


def _show(value: Any) -> str:
    """Return a short text for a value of any size or depth."""
    try:
        return reprlib.repr(value).encode("utf-8", "backslashreplace").decode()
    except ValueError:  # Python does not print integers of more than 4300 digits
        return f"a value of type {type(value).__name__}"


def _move_one_mark(text: str, role: Role) -> str:
    """Put the only image mark of a question at its start, as LLaVA does."""
    if role != "user" or text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _mark_videos(turns: list[Turn], has_images: bool) -> list[Turn]:
    """Turn the marks of a record that names videos into ``VIDEO_TOKEN``."""
    asked = [turn.text for turn in turns if turn.role == "user"]
    if any(VIDEO_TOKEN in text for text in asked):  # content parts have said where they belong
        return turns
    # LLaVA-NeXT writes <image> for its videos
    mark = VIDEO_TEXT if has_images or any(VIDEO_TEXT in text for text in asked) else IMAGE_TOKEN
    return [
        replace(turn, text=turn.text.replace(mark, VIDEO_TOKEN)) if turn.role == "user" else turn
        for turn in turns
    ]


def _check_turns(turns: list[Turn], where: str) -> None:
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
    if not any(turn.supervised for turn in dialogue[1::2]):
        raise RecordError(
            where, "no answer", "every answer is switched off (loss, weight or train)"
        )


def _check_marks(turns: list[Turn], mark: str, n_files: int, kind: str, where: str) -> None:
    marks = sum(turn.text.count(mark) for turn in turns if turn.role == "user")
    detail = f"{marks} <{kind}> marks, {n_files} {kind}s"
    if marks > n_files:
        raise RecordError(where, f"more {kind} marks than {kind}s", detail)
    if marks < n_files:
        detail += f"; put one mark for each {kind}"
        raise RecordError(where, f"more {kind}s than {kind} marks", detail)


def _check_images(conversation: Conversation, folder: Path | None, must_exist: bool) -> None:
    for name in (*conversation.images, *conversation.videos):
        try:
            image_path = resolve_image(folder or Path(), name)
            is_missing = folder is not None and must_exist and not image_path.is_file()
        except (ImagePathError, OSError) as error:  # OSError: a name longer than the disk takes
            raise RecordError(conversation.where, "bad image path", str(error)) from error
        if is_missing:
            raise RecordError(conversation.where, "image file missing", str(image_path))
