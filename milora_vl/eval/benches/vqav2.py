"""VQAv2: free short answers, scored against ten people's answers with leave-one-out accuracy.

Official files: a questions file and, where answers are published, an annotations file; pictures are
``COCO_{subset}_{image_id:012d}.jpg``, or without ``COCO_`` for other sets. A question may also name
its picture itself, under ``image``.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_vl.eval import statistics
from milora_vl.eval.answers import m4c, most_common, vqa_accuracy
from milora_vl.eval.items import (
    ImageSource,
    Item,
    Row,
    find_file,
    find_image,
    read_json_object,
    reject_duplicates,
    require,
    split_rows,
    take_sample,
)
from milora_vl.files import write_text_atomic

VERSION = 1
METRIC = "vqa_accuracy"
MAX_NEW_TOKENS = 16

_SUFFIX = "Answer the question using a single word or phrase."
_FOLDERS = ("vqa", "vqav2", "VQAv2", ".")
_QUESTION_FILES = (
    *("questions.json", "*val2014_questions.json"),
    *("*test-dev2015_questions.json", "*test2015_questions.json", "*_questions.json"),
)
_ANNOTATION_FILES = ("annotations.json", "*val2014_annotations.json", "*_annotations.json")
_IMAGE_FOLDERS = (
    *("images/bench", "images/val", "../images/bench", "../images/val", "images"),
    *("val2014", "vqav2/val2014", "test2015", "vqav2/test2015", "../val2014", "coco/val2014"),
)
_FEWEST_FOR_A_GUESS = 5


def load(data_dir: Path, *, limit: int | None = None) -> list[Item]:
    """Read questions and, if they are there, the answers.

    Args:
        data_dir: Folder with ``vqa/questions.json`` or ``v2_OpenEnded_mscoco_*_questions.json``,
            and the annotations beside it.
        limit: Number of questions.

    Raises:
        FileNotFoundError: If there is no questions file.
        ValueError: If a file is malformed, an id occurs twice, or a question has no annotation.
    """
    path = find_file(data_dir, _FOLDERS, _QUESTION_FILES)
    if path is None:
        raise FileNotFoundError(
            f"no questions.json or *_questions.json in {data_dir} or its folder vqa"
        )
    content = read_json_object(path)
    questions = require(content, "questions", str(path))
    subset = str(content.get("data_subtype", "val2014")).replace("test-dev", "test")
    annotations = _read_annotations(path)
    folders = [data_dir / name for name in _IMAGE_FOLDERS] + [path.parent]
    items = [
        _item(row, f"{path.name} questions[{place}]", subset, annotations, folders)
        for place, row in enumerate(questions)
    ]
    reject_duplicates((item.id for item in items), str(path))
    return take_sample(items, limit)


def _read_annotations(questions: Path) -> dict[str, dict[str, Any]] | None:
    own = questions.with_name(
        questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    )
    path = own if own.is_file() else None
    if path is None and "test" not in questions.name:
        path = find_file(questions.parent, (".",), _ANNOTATION_FILES)
    if path is None:
        return None
    rows = require(read_json_object(path), "annotations", str(path))
    for place, row in enumerate(rows):
        n_answers = len(require(row, "answers", f"{path.name} annotations[{place}]"))
        if n_answers < 2:
            raise ValueError(
                f"{path} annotations[{place}]: {n_answers} answers, two or more needed"
            )
    return {str(row["question_id"]): row for row in rows}


def _item(
    row: dict[str, Any],
    where: str,
    subset: str,
    annotations: dict[str, dict[str, Any]] | None,
    folders: Sequence[Path],
) -> Item:
    question_id = require(row, "question_id", where)
    image_id = require(row, "image_id", where)
    question = require(row, "question", where)
    names = [str(row.get("image", image_id))]
    if "image" not in row and isinstance(image_id, int):
        stem = f"{subset}_{image_id:012d}"
        names = [f"COCO_{stem}.jpg", f"{stem}.png", f"{stem}.jpg"]
    answer: dict[str, Any] = {}
    if annotations is not None:
        if str(question_id) not in annotations:
            raise ValueError(f"{where}: question {question_id} has no annotation")
        answer = annotations[str(question_id)]
    return Item(
        id=str(question_id),
        image=ImageSource(where, path=find_image(folders, *names)),
        prompt=f"{question}\n{_SUFFIX}",
        answers=tuple(str(one["answer"]) for one in answer.get("answers", ())),
        group=str(image_id),
        category=str(answer.get("answer_type", "all")),
        question=question,
        details={
            "question_id": question_id,
            "question_type": str(answer.get("question_type", "all")),
        },
    )


def parse(item: Item, text: str) -> str | None:
    """Return the answer as it is uploaded and scored."""
    del item
    return m4c(text)


def judge(item: Item, text: str | None) -> Row:
    """Score one answer. ``text`` None is a failed sample, always wrong."""
    is_scored = text is not None and item.answers
    return Row(
        id=item.id,
        group=item.group,
        category=item.category,
        answers=item.answers,
        text=text,
        parsed=None if text is None else parse(item, text),
        score=vqa_accuracy(text, item.answers) if is_scored else 0.0,
        well_formed=bool(text and text.strip()),
        details=item.details,
    )


def headline_sums(rows: Sequence[Row]) -> statistics.Array:
    """Return [pictures, 2]: credit and number of questions."""
    return statistics.sum_by_group([[row.score, 1.0] for row in rows], [row.group for row in rows])


def headline(sums: statistics.Array) -> statistics.Array:
    """Return accuracy from sums [R, 2]."""
    return statistics.ratio(sums)


def _accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    interval = statistics.bootstrap_interval(headline_sums(rows), headline)
    score = float(np.mean([row.score for row in rows]))
    return {"score": score, "interval_95": list(interval), "n": len(rows)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and breakdown (answer type, question type) of all rows."""
    parts = split_rows(rows, [row.category for row in rows])
    by_category = {name: _accuracy(part) for name, part in parts.items()}
    types = split_rows(rows, [row.details["question_type"] for row in rows])
    return {
        "metric": METRIC,
        **_accuracy(rows),
        "by_category": {name: part["score"] for name, part in by_category.items()},
        "by_category_details": by_category,
        "by_question_type": {name: _accuracy(part)["score"] for name, part in types.items()},
        "empty_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of answering each question type with its most frequent answer.

    Types of fewer than five questions are guessed with the answer of their answer type.
    """
    by_type = defaultdict(list)
    by_category = defaultdict(list)
    for item in items:
        by_type[item.details["question_type"]].append(most_common(item.answers))
        by_category[item.category].append(most_common(item.answers))
    total = 0.0
    for item in items:
        known = by_type[item.details["question_type"]]
        if len(known) < _FEWEST_FOR_A_GUESS:
            known = by_category[item.category]
        total += vqa_accuracy(most_common(known), item.answers)
    return total / len(items)


def write_submission(
    items: Sequence[Item], texts: Mapping[str, str | None], out_dir: Path
) -> list[Path]:
    """Write the JSON list that the challenge server takes: question_id and processed answer.

    The server wants every question of test2015: run on that file, not on test-dev alone.
    """
    rows = [
        {"question_id": item.details["question_id"], "answer": m4c(answer)}
        for item in items
        if (answer := texts[item.id]) is not None
    ]
    path = out_dir / "vqav2_submission.json"
    write_text_atomic(path, json.dumps(rows, ensure_ascii=False) + "\n")
    return [path]
