"""GQA: compositional questions on real images, right only if the answer is the very word.

Official file: ``testdev_balanced_questions.json`` (questions1.2), an object of questions by id;
images are ``{imageId}.jpg``.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring
from milora_vl.eval.bench_files import (
    Mirror,
    Record,
    by_id,
    image_file,
    locate,
    reject_duplicates,
    rows_without,
    table_image,
)
from milora_vl.eval.items import ImageSource, Item, Row

FILES = "testdev_balanced_questions.json"
VERSION = 1
METRIC = "exact_match"
MAX_NEW_TOKENS = 16
MIRRORS = (
    Mirror("GQA", "testdev_balanced_instructions", "testdev"),
    Mirror("GQA", "testdev_balanced_images", "testdev"),
)

_FOLDERS = ("gqa", "gqa/data", "gqa/data/questions1.2", "gqa/questions1.2", "questions1.2", "GQA")
_FILES = ("*testdev_balanced_questions.json",)
_IMAGE_FOLDERS = ("images", "../images", "data/images", "../../images")
_NO_STEPS = ("exist", "query: name", "choose name")
"""Operations that the official scorer does not count as steps of reasoning."""


def load(data_dir: Path | None) -> list[Item]:
    """Read the balanced questions."""
    return _from_files(data_dir) if data_dir is not None else _from_mirror()


def _from_files(data_dir: Path) -> list[Item]:
    path = locate(data_dir, _FOLDERS, _FILES, "GQA questions")
    items = []
    for key, row in by_id(path, "question"):
        name = f"{row.text('imageId')}.jpg"
        row.reject_other_images(("imageId",), has_image=True)
        if _is_balanced(row):
            items.append(_item(key, row, image_file(path, _IMAGE_FOLDERS, row, name)))
    return items


def _is_balanced(row: Record) -> bool:
    value = row.values.get("isBalanced", True)
    if not isinstance(value, bool):
        raise row.error(f"isBalanced is {value!r}; true or false was expected")
    return value


def _from_mirror() -> list[Item]:
    questions, images = (mirror.open() for mirror in MIRRORS)
    rows = [Record(row, f"GQA mirror row {i}") for i, row in enumerate(rows_without(images))]
    places = {row.text("id"): place for place, row in enumerate(rows)}
    items = []
    for place, values in enumerate(rows_without(questions, "image")):
        row = Record(values, f"GQA mirror question {values.get('id', place)}")
        image_id = row.text("imageId")
        if image_id not in places:
            raise row.error(f"no image {image_id}")
        if _is_balanced(row):
            source = table_image(images, places[image_id], f"{row.where} ({image_id})")
            items.append(_item(row.text("id"), row, source))
    reject_duplicates((item.id for item in items), "GQA mirror")
    return items


def _item(key: str, row: Record, image: ImageSource) -> Item:
    question = row.text("question")
    types = row.object("types")
    structural = types.text("structural", "None")
    program = row.records("semantic") if row.has("semantic") else []
    return Item(
        id=key,
        image=image,
        prompt=f"{question}\n{scoring.SHORT_ANSWER}",
        answers=(_label(row),) if row.has("answer") else (),
        group=row.text("imageId"),
        category="open" if structural == "query" else "binary",
        question=question,
        details={
            "structural": structural,
            "semantic": types.text("semantic", "None"),
            "n_words": len(question.split()),
            "n_steps": _count_steps(program),
            "answer_group": row.object("groups").text("global", "") or None,
        },
    )


def _label(row: Record) -> str:
    """Return the right answer in the form of a parsed one, or it could never be matched."""
    label = row.text("answer").strip().rstrip(".").lower()
    if not label:
        raise row.error("the answer is nothing but periods")
    return label


def _count_steps(program: Sequence[Record]) -> int:
    """Count the operations of a question's program but for those that only ask its last step."""
    texts = [f"{one.values.get('operation')}: {one.values.get('argument')}" for one in program]
    return sum(not any(part in text for part in _NO_STEPS) for text in texts)


def parse(item: Item, text: str) -> str | None:
    """Return the answer as LLaVA scores it: no final periods, lower case, nothing else."""
    return text.rstrip(".").lower()


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 if equal. ``text`` None is a failed sample, always wrong."""
    said = None if text is None else parse(item, text)
    return scoring.judged(item, text, said, float(said in item.answers), bool(said))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and the official breakdowns; ``distribution`` is better when low."""
    return {
        **scoring.summarize_mean(
            rows,
            METRIC,
            by_structural=lambda row: row.details["structural"],
            by_semantic=lambda row: row.details["semantic"],
            by_n_words=lambda row: f"{row.details['n_words']:02d}",
            by_n_steps=lambda row: f"{row.details['n_steps']:02d}",
        ),
        "distribution": _distribution(rows),
        "empty_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


def _distribution(rows: Sequence[Row]) -> float | None:
    """Return the chi-square between right and given answers in each group of answers, over 100."""
    right: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        group = row.details["answer_group"]
        if group is not None:
            right[group][row.answers[0]] += 1
            given[group][row.parsed or ""] += 1
    n_questions = sum(counts.total() for counts in right.values())
    if n_questions == 0:
        return None
    total = 0.0
    for group, counts in right.items():
        # answers that are never right in the group count nothing, as in the official scorer
        distances = ((given[group][answer] - n) ** 2 / n for answer, n in counts.items())
        total += counts.total() * sum(distances)
    return total / n_questions / 100


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of each structural type's most frequent answer."""
    return scoring.best_constant(items, judge, lambda item: item.details["structural"])


# what GQA's own scorer reads
submission = scoring.one_file(
    "gqa_submission.json",
    lambda item, text: {"questionId": item.id, "prediction": parse(item, text)},
)
