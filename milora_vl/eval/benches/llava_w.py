"""LLaVA-Bench (in the wild): open questions; a judge model compares each answer with a reference.

Official files: ``questions.jsonl``, ``context.jsonl`` (what the image shows, for the judge) and
``answers_gpt4.jsonl`` (the reference), images in ``images/``. The score is the mean grade of the
model over that of the reference. The judge's prompt is worded here, and the judge of the published
numbers is no longer offered: scores compare with others of the same judge and version only.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from milora_vl.eval import scoring, statistics
from milora_vl.eval.bench_files import (
    BenchError,
    Mirror,
    Record,
    image_file,
    locate,
    numbered,
    read_mirror,
    reject_duplicates,
)
from milora_vl.eval.items import ImageSource, Item, Row, split_rows
from milora_vl.eval.scoring import Files, Texts

FILES = "questions.jsonl, context.jsonl, answers_gpt4.jsonl"
VERSION = 1
METRIC = "judge_score_over_reference"
MAX_NEW_TOKENS = 1024
JUDGE_PROMPT = "milora_vl llava-w 1"
MIRRORS = (Mirror("llava-bench-in-the-wild", None, "train"),)

_FOLDERS = ("llava-bench-in-the-wild", "llava-w", "llava_w")
_GRADES = re.compile(r"(?<![\d.])(10|\d)(?:\.\d+)?(?![\d.]*\d)")
# with any change of it or of judge_prompt, JUDGE_PROMPT gets a new number
_INSTRUCTION = """\
Two assistants answered a question about a picture. You cannot see it; its content is described
below. Grade each answer from 1 to 10 for being helpful, relevant, correct and detailed; the order
of the two must not matter. On the first line write both grades, the first answer's first,
separated by a space, and nothing else. Then explain in short.
"""
parse = scoring.parse_free
majority = scoring.no_majority


def load(data_dir: Path | None) -> list[Item]:
    """Read questions, contexts and reference answers."""
    return _from_files(data_dir) if data_dir is not None else _from_mirror()


def _from_files(data_dir: Path) -> list[Item]:
    path = locate(data_dir, _FOLDERS, ("questions.jsonl",), "LLaVA-Bench questions")
    context = _read_by(path.with_name("context.jsonl"), "image", "caption")
    reference = _read_by(path.with_name("answers_gpt4.jsonl"), "question_id", "text")
    items = []
    for row in numbered(path):
        name = row.image_name("image") or row.text("image")
        row.reject_other_images(("image",), has_image=True)
        key = row.text("question_id")
        if name not in context:
            raise row.error(f"context.jsonl has no context for {name}")
        if key not in reference:
            raise row.error(f"answers_gpt4.jsonl has no reference for {key}")
        image = image_file(path, ("images",), row, name)
        items.append(_item(row, "text", name, image, (context[name], reference[key])))
    reject_duplicates((item.id for item in items), str(path))
    return items


def _read_by(path: Path, key: str, value: str) -> dict[str, str]:
    if not path.is_file():
        raise BenchError(f"{path} is missing; LLaVA-Bench needs it beside questions.jsonl")
    rows = [(row.text(key), row.text(value)) for row in numbered(path)]
    reject_duplicates((name for name, _ in rows), str(path))
    return dict(rows)


def _from_mirror() -> list[Item]:
    items = []
    for row, image in read_mirror(MIRRORS, "LLaVA-Bench"):
        texts = row.text("caption"), row.text("gpt_answer")
        items.append(_item(row, "question", row.text("image_id", row.where), image, texts))
    return items


def _item(
    row: Record, question_key: str, group: str, image: ImageSource, texts: tuple[str, str]
) -> Item:
    question = row.text(question_key)
    context, reference = texts
    return Item(
        id=row.text("question_id"),
        image=image,
        prompt=question,
        answers=(),
        group=group,
        category=row.text("category", "all").removeprefix("llava_bench_"),
        question=question,
        details={"context": context, "reference": reference},
    )


def judge(item: Item, text: str | None) -> Row:
    """Return the row of an answer, without a score until a judge's reply is there."""
    return scoring.judge_free(item, text, {"reference_score": 1.0})


def judge_prompt(item: Item, text: str) -> str:
    """Return what the judge is asked about an answer; the reference is the first one."""
    return (
        f"{_INSTRUCTION}\n[Picture]\n{item.details['context']}\n\n[Question]\n{item.question}\n\n"
        f"[Answer 1]\n{item.details['reference']}\n\n[Answer 2]\n{text}\n"
    )


def _read_grades(reply: str) -> list[float]:
    first_line = reply.strip().splitlines()[0] if reply.strip() else ""
    return [float(found.group()) for found in _GRADES.finditer(first_line)]


def is_usable(reply: str) -> bool:
    """Tell whether the first line holds two grades between 1 and 10."""
    grades = _read_grades(reply)
    return len(grades) == 2 and all(1 <= grade <= 10 for grade in grades)


def with_reply(row: Row, reply: str) -> Row:
    """Return the row with the judge's grades, a tenth each: the model's and the reference's."""
    reference, model = _read_grades(reply)
    details = {**row.details, "judge_reply": reply, "reference_score": reference / 10}
    return replace(row, score=model / 10, details=details)


def headline_sums(rows: Sequence[Row]) -> statistics.Array:
    """Return [images, 2]: grades of the model and of the reference."""
    table = [[row.score, row.details["reference_score"]] for row in rows]
    return statistics.sum_by_group(table, [row.group for row in rows])


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean grade over the reference's, interval, and the same by category."""
    sums = headline_sums(rows)
    parts = split_rows(rows, [row.category for row in rows])
    by_category = {name: statistics.total(headline_sums(part)) for name, part in parts.items()}
    return {
        "metric": METRIC,
        "score": statistics.total(sums),
        "interval_95": list(statistics.bootstrap_interval(sums)),
        "n": len(rows),
        "by_category": by_category,
        "mean_grade": 10 * float(np.mean([row.score for row in rows])),
        "mean_reference_grade": 10 * float(np.mean([r.details["reference_score"] for r in rows])),
    }


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return the official answers file and the judge's prompts."""
    pairs = scoring.answered(items, texts)
    return {
        "llava_w_answers.jsonl": [
            {"question_id": item.id, "prompt": item.question, "text": text} for item, text in pairs
        ],
        "llava_w_judge_prompts.jsonl": [
            {"id": item.id, "prompt": judge_prompt(item, text)} for item, text in pairs
        ],
    }
