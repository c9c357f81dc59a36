"""Your own questions: a JSONL file of ``question``, ``image`` and ``choices`` or ``answers``.

A line with ``choices`` (a list, or an object of letters and texts) is lettered and has ``answer``,
a letter or the text of a choice. Any other line is free: it has ``answers``, a list, or one
``answer``, and is right if the model says one of them once both are normalized. With neither
there is no score. ``image`` is a file name, a data URI or base64 text, or a list of them, all of
which are shown before the question. Optional: ``id``,
``category``, ``prompt`` (the whole prompt, used as it is).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring
from milora_vl.eval.answers import m4c, parse_option, vqa_official
from milora_vl.eval.bench_files import (
    Record,
    check_options,
    gold_letter,
    image_file,
    locate,
    numbered,
    reject_duplicates,
    shorten,
)
from milora_vl.eval.items import Item, Row

logger = logging.getLogger(__name__)

FILES = "a JSONL file: question, image, and choices + answer, or answers"
VERSION = 1
METRIC = "accuracy"
MAX_NEW_TOKENS = 32

_KNOWN = (
    *("id", "question", "image", "images", "choices", "answer", "answers", "category", "prompt"),
)
_MEANT = {"options": "choices", "label": "answer", "labels": "answers", "gold": "answer"}
"""Keys of other formats that would change the question or its score if they were left out."""


def load(data_dir: Path | None) -> list[Item]:
    """Read the questions.

    Args:
        data_dir: The JSONL file, or a folder with ``custom.jsonl``; images are named relative to
            the file.
    """
    if data_dir is None:
        raise FileNotFoundError("the bench 'custom' has no mirror: name its JSONL file with --data")
    path = locate(data_dir, ("custom",), ("*custom.jsonl",), "questions of your own")
    rows = list(numbered(path))
    items = [_item(row, path, number) for number, row in enumerate(rows, start=1)]
    reject_duplicates((item.id for item in items), str(path))
    ignored = sorted({str(key) for row in rows for key in row.values} - set(_KNOWN))
    if ignored:
        logger.warning("%s: keys that are not read: %s", path, shorten(", ".join(ignored), 200))
    return items


def _item(row: Record, path: Path, number: int) -> Item:
    question = row.text("question")
    names = row.image_names("image", "images")
    row.reject_other_images(_KNOWN, has_image=bool(names))
    for key, meant in _MEANT.items():
        if row.has(key):
            raise row.error(f"key {key!r} is not read; {meant!r} is what it is called here")
    choices = _choices(row)
    letters = tuple(scoring.LETTERS[: len(choices)])
    ending = scoring.LETTER_ANSWER if choices else scoring.SHORT_ANSWER
    prompt = "\n".join([question, *scoring.lettered(choices), ending])
    key = row.text("id", str(number))
    images = [image_file(path, ("images",), row, name) for name in names]
    return Item(
        id=key,
        image=images[0] if images else None,
        more_images=tuple(images[1:]),
        prompt=row.text("prompt", prompt),
        answers=_answers(row, choices),
        group=" ".join(names) or key,
        category=row.text("category", "all"),
        options=choices,
        question=question,
        choices=letters,
    )


def _choices(row: Record) -> tuple[str, ...]:
    if not row.has("choices") or row.values["choices"] == []:
        return ()
    value = row.values["choices"]
    if isinstance(value, dict):
        if list(value) != list(scoring.LETTERS[: len(value)]):
            raise row.error(
                f"choices {shorten(repr(list(value)))}: A, B, ... were expected as keys"
            )
        row = Record({"choices": list(value.values())}, row.where)
    choices = check_options(row.texts("choices"), row)
    if not all(one.strip() for one in choices) or len(set(choices)) < len(choices):
        raise row.error("a choice is empty, or two are equal")
    return choices


def _answers(row: Record, choices: tuple[str, ...]) -> tuple[str, ...]:
    if choices:
        if row.has("answers"):
            raise row.error("choices and answers; give one of the two")
        return (_letter(row, choices),) if row.has("answer") else ()
    if row.has("answer") and row.has("answers"):
        raise row.error("answer and answers; give one of the two")
    key = "answer" if row.has("answer") else "answers"
    is_list = isinstance(row.values.get(key), (list, tuple))
    answers = row.texts(key) if is_list else (row.text(key),) if row.has(key) else ()
    if "" in map(_normalize, answers):
        # what is left of an empty answer is what is left of "the"
        raise row.error(f"{key}: nothing is left of one of them once it is normalized")
    return answers


def _letter(row: Record, choices: tuple[str, ...]) -> str:
    answer = row.text("answer")
    letter = gold_letter(answer, choices, row)
    if answer in choices and choices.index(answer) != scoring.LETTERS.index(letter):
        raise row.error(f"answer {answer!r} is a letter and also the text of another choice")
    return letter


def _normalize(text: str) -> str:
    return vqa_official(m4c(text))


def parse(item: Item, text: str) -> str | None:
    """Return the letter, or the answer as it is compared."""
    return parse_option(text, item.options) if item.options else _normalize(text)


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 if right. ``text`` None is a failed sample, always wrong."""
    said = None if text is None else parse(item, text)
    if item.options:
        is_formed = scoring.is_bare_letter(text, len(item.options))
        return scoring.judged(item, text, said, float(said in item.answers), is_formed)
    right = {_normalize(answer) for answer in item.answers}
    return scoring.judged(item, text, said, float(said in right), bool(said))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy, interval and breakdown by ``category``."""
    return scoring.summarize_mean(rows, METRIC)


submission = scoring.one_file(
    "custom_answers.jsonl",
    lambda item, text: {"id": item.id, "text": text, "parsed": parse(item, text)},
)
