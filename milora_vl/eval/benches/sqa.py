"""ScienceQA: lettered school questions. IMG: those with an image; full: all of the test split.

Official files: ``problems.json`` (by id) and ``pid_splits.json``; images are
``test/{id}/image.png``. LLaVA's published numbers are IMG ones; never compare one with the other.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from milora_vl.eval import scoring
from milora_vl.eval.answers import parse_option
from milora_vl.eval.bench_files import (
    BenchError,
    Mirror,
    Record,
    by_id,
    check_options,
    image_file,
    is_encoded,
    locate,
    read_json_object,
    reject_duplicates,
    rows_without,
    shorten,
    table_image,
)
from milora_vl.eval.items import ImageSource, Item, Row
from milora_vl.eval.scoring import Files, Texts

FILES = "problems.json + pid_splits.json: questions with an image"
VERSION = 1
METRIC = "img_accuracy"
METRIC_FULL = "accuracy"
MAX_NEW_TOKENS = 8
MIRRORS = (Mirror("ScienceQA", "ScienceQA-FULL", "test"),)

_FOLDERS = ("scienceqa", "ScienceQA", "sqa", "scienceqa/data/scienceqa", "data/scienceqa")
_IMAGE_FOLDERS = ("images/test", "test", "images", "../images/test", "../test")
_OFFICIAL_LETTERS = "ABCDE"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_LOWER_GRADES = frozenset(f"grade{number}" for number in range(1, 7))


def load(data_dir: Path | None) -> list[Item]:
    """Read the questions of the test split that have an image."""
    items = [item for item in load_full(data_dir) if item.image is not None]
    if not items:
        source = data_dir or "ScienceQA mirror"
        raise BenchError(f"{source}: no question of the test split has an image; use sqa-full")
    return items


def load_full(data_dir: Path | None) -> list[Item]:
    """Read all questions of the test split, with and without an image."""
    if data_dir is None:
        table = MIRRORS[0].open()
        # the mirror has no column of ids: its row number is the id
        items = []
        for place, values in enumerate(rows_without(table, "image")):
            row = Record(values, f"ScienceQA mirror row {place}")
            has_image = table[place].get("image") is not None
            image = table_image(table, place, row.where) if has_image else None
            items.append(_item(f"row{place}", row, image))
        return items
    path = locate(data_dir, _FOLDERS, ("problems.json",), "ScienceQA problems")
    splits = path.with_name("pid_splits.json")
    if not splits.is_file():
        raise BenchError(f"{splits} is missing: it says which problems are the test split")
    problems = dict(by_id(path, "problem"))
    test = Record(read_json_object(splits), splits.name).texts("test")
    reject_duplicates(test, str(splits))
    items = []
    for key in test:
        if key not in problems:
            raise BenchError(f"{path}: no problem {key!r}, which {splits.name} names as test")
        row = problems[key]
        name = row.image_name("image")
        row.reject_other_images(("image",), has_image=name is not None)
        image = None
        if name is not None:
            # official images lie in a folder named as the problem
            names = (name,) if is_encoded(name) else (f"{key}/{name}", f"test/{key}/{name}")
            image = image_file(path, _IMAGE_FOLDERS, row, *names)
        items.append(_item(key, row, image))
    return items


def _item(key: str, row: Record, image: ImageSource | None) -> Item:
    question, options = row.text("question"), check_options(row.texts("choices"), row)
    hint = row.text("hint", "", blank=True)
    lines = [f"Context: {hint}"] if hint else []
    lines += [question, *scoring.lettered(options), scoring.LETTER_ANSWER]
    letters = tuple(scoring.LETTERS[: len(options)])
    return Item(
        id=key,
        image=image,
        prompt="\n".join(lines),
        answers=(letters[_number(row, len(options))],) if row.has("answer") else (),
        group=key,
        category=row.text("subject", "all"),
        options=options,
        question=question,
        details={
            "context": "image" if image else "text" if hint else "none",
            "has_image": image is not None,
            "has_text": bool(hint),
            "grades": "1-6" if row.text("grade", "") in _LOWER_GRADES else "7-12",
        },
        choices=letters,
    )


def _number(row: Record, n_options: int) -> int:
    """Return the number of the right choice, from 0. A letter or a text is not what files hold."""
    answer = row.get("answer")
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    if not is_number or answer not in range(n_options):
        raise row.error(
            f"answer {shorten(repr(answer))} is not the number of a choice, 0 to {n_options - 1}"
        )
    return int(answer)


def parse(item: Item, text: str) -> str | None:
    """Return the letter by LLaVA's rule: bare, "A. ...", or one "The answer is A." in the text."""
    if text and text in _OFFICIAL_LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in _OFFICIAL_LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _SENTENCE.findall(text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in item.choices else None


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 for the right letter. ``text`` None is a failed sample, always wrong."""
    letter = None if text is None else parse(item, text)
    lenient = None if text is None else parse_option(text, item.options)
    return scoring.judged(
        item,
        text,
        letter,
        float(letter in item.answers),
        scoring.is_bare_letter(text, len(item.options)),
        {"lenient": lenient},
    )


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return IMG accuracy, interval and breakdown (subject, context, grades)."""
    return _summarize([row for row in rows if row.details["has_image"]], METRIC)


def summarize_full(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over all questions, and ``img_accuracy`` beside it."""
    images = scoring.mean_score([row for row in rows if row.details["has_image"]])
    return {**_summarize(rows, METRIC_FULL), "img_accuracy": images}


def _summarize(rows: Sequence[Row], metric: Literal["img_accuracy", "accuracy"]) -> dict[str, Any]:
    return {
        **scoring.summarize_mean(
            rows,
            metric,
            by_context=lambda row: row.details["context"],
            by_grades=lambda row: row.details["grades"],
        ),
        **scoring.letter_rates(rows),
    }


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return the results of ScienceQA's own scorer: id -> number of the option, -1 for none."""
    results = {}
    for item in items:
        text = texts[item.id]
        letter = None if text is None else parse(item, text)
        results[item.id] = -1 if letter is None else item.choices.index(letter)
    return {"sqa_submission.json": {"results": results}}


VARIANTS = {
    "sqa-full": {
        "FILES": "the same: all questions",
        "load": load_full,
        "summarize": summarize_full,
        "METRIC": METRIC_FULL,
    },
}
