"""VizWiz: blind people's own photos and questions; "unanswerable" is an answer like any other.

Official files: ``val.json`` or ``test.json``, a list of ``image, question, answers`` (test: no
answers, for the evaluation server); images in ``val/`` or ``test/``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring
from milora_vl.eval.answers import m4c
from milora_vl.eval.bench_files import (
    Mirror,
    Record,
    image_file,
    locate,
    read_json,
    read_mirror,
    reject_duplicates,
)
from milora_vl.eval.items import ImageSource, Item, Row

FILES = "val.json, test.json"
VERSION = 1
METRIC = "vqa_accuracy"
MAX_NEW_TOKENS = 16
MIRRORS = (Mirror("VizWiz-VQA", None, "val"),)

_FOLDERS = ("vizwiz", "VizWiz", "vizwiz/Annotations", "VizWiz/Annotations", "Annotations")
_FILES = ("val.json", "test.json")
_IMAGE_FOLDERS = ("val", "test", "images", "../val", "../test", "../images")
_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

parse = scoring.parse_m4c
judge = scoring.judge_m4c


def load(data_dir: Path | None) -> list[Item]:
    """Read ``val.json`` (else ``test.json``), or the mirror of the validation split."""
    return _from_mirror() if data_dir is None else _from_file(data_dir)


def _from_file(data_dir: Path) -> list[Item]:
    path = locate(data_dir, _FOLDERS, _FILES, "VizWiz questions")
    items = []
    for row in Record({"": read_json(path)}, path.name).records(""):
        name = row.image_name("image") or row.text("image")
        row.reject_other_images(("image",), has_image=True)
        image = image_file(path, _IMAGE_FOLDERS, row, name)
        answers = tuple(one.text("answer", blank=True) for one in people(row))
        items.append(_item(row, name, image, answers, row.text("answer_type", "all")))
    reject_duplicates((item.id for item in items), str(path))
    return items


def people(row: Record) -> list[Record]:
    """Return the answers of a question, an object each; none if they are not published."""
    return row.records("answers") if row.has("answers") else []


def _from_mirror() -> list[Item]:
    items = []
    for row, image in read_mirror(MIRRORS, "VizWiz"):
        name = f"{row.text('question_id')}.jpg"
        answers = row.texts("answers", ())
        items.append(_item(row, name, image, answers, row.text("category", "all")))
    return items


def _item(
    row: Record, name: str, image: ImageSource, answers: tuple[str, ...], category: str
) -> Item:
    question = row.text("question")
    if len(answers) == 1:
        raise row.error("1 answer, two or more needed")
    return Item(
        id=name,
        image=image,
        prompt=f"{question}\n{_UNANSWERABLE}\n{scoring.SHORT_ANSWER}",
        answers=answers,
        group=name,
        category=category,
        question=question,
    )


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and breakdown by answer type."""
    said = [row.parsed for row in rows]
    return {
        **scoring.summarize_mean(rows, METRIC),
        "unanswerable_rate": said.count("unanswerable") / len(rows),
        "empty_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of one constant answer, which is "unanswerable" in the official files."""
    return scoring.best_constant(items, judge, lambda item: "all")


# what the evaluation server takes
submission = scoring.one_file(
    "vizwiz_submission.json", lambda item, text: {"image": item.id, "answer": m4c(text)}
)
