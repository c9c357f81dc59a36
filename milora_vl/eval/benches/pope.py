"""POPE: is an object in the image? Three ways of choosing the absent objects, F1 of "yes".

Official files: JSONL with ``question_id, image, text, label``, one a category. ``question_id``
starts again in each file, so an answer belongs to (category, question_id), never to a line number.
Questions are asked as they are written, with the misspelt "imange" of early releases too.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import parse_yes_no
from milora_vl.eval.bench_files import (
    Mirror,
    Record,
    find_file,
    find_image,
    gold_yes_no,
    numbered,
    read_mirror,
    reject_duplicates,
)
from milora_vl.eval.items import ImageSource, Item, Row, split_rows, take_sample
from milora_vl.eval.scoring import Files, Texts

logger = logging.getLogger(__name__)

FILES = "coco_pope_random.json (popular, adversarial), or pope/random.jsonl ..."
VERSION = 1
METRIC = "mean_f1"
MAX_NEW_TOKENS = 8
CATEGORIES = ("random", "popular", "adversarial")
MIRRORS = (Mirror("POPE", None, "test"),)

_FOLDERS = ("pope", "pope/coco", "coco", "POPE", ".")
_IMAGE_FOLDERS = (
    *("images/bench", "images/val", "../images/bench", "../images/val", "images"),
    *("pope/images", "pope/val2014", "val2014", "coco/val2014", "../val2014"),
)
_N_COUNTS = 4  # true positive, false positive, false negative, true negative


def load(data_dir: Path | None) -> list[Item]:
    """Read the questions of all category files that are there.

    Args:
        data_dir: Folder with ``pope/{category}.jsonl`` or ``coco_pope_{category}.json``.
    """
    parts = _from_files(data_dir) if data_dir is not None else _from_mirror()
    missing = sorted(set(CATEGORIES) - set(parts))
    if missing:
        logger.warning("POPE without %s: the mean is over %s", ", ".join(missing), ", ".join(parts))
    return [item for part in parts.values() for item in part]


def sample(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return a sample spread over the categories, half of it "yes", as far as there are."""
    if limit is None:
        return list(items)
    categories = list(dict.fromkeys(item.category for item in items))
    kept: set[str] = set()
    for place, category in enumerate(categories):
        share = (limit - place + len(categories) - 1) // len(categories)
        for label, n in (("yes", (share + 1) // 2), ("no", share // 2)):
            asked = [x.id for x in items if x.category == category and x.answers == (label,)]
            kept |= set(take_sample(asked, n))
    return [item for item in items if item.id in kept]


def _from_files(data_dir: Path) -> dict[str, list[Item]]:
    parts = {}
    for category in CATEGORIES:
        path = find_file(data_dir, _FOLDERS, (f"{category}.jsonl", f"*pope_{category}.json*"))
        if path is not None:
            parts[category] = _read_category(data_dir, category, path)
    if not parts:
        raise FileNotFoundError(
            f"no random.jsonl or coco_pope_random.json (popular, adversarial) in {data_dir} or its "
            "folders pope, coco"
        )
    return parts


def _from_mirror() -> dict[str, list[Item]]:
    parts: dict[str, list[Item]] = {name: [] for name in CATEGORIES}
    for row, image in read_mirror(MIRRORS, "POPE"):
        category = row.text("category")
        if category not in parts:
            raise row.error(f"category {category!r} is none of {', '.join(CATEGORIES)}")
        name = f"{row.text('image_source')}.jpg"
        parts[category].append(_item(row, category, name, image, ("question", "answer")))
    reject_duplicates((item.id for part in parts.values() for item in part), "POPE mirror")
    return {name: part for name, part in parts.items() if part}


def _read_category(data_dir: Path, category: str, path: Path) -> list[Item]:
    folders = [data_dir / name for name in _IMAGE_FOLDERS] + [path.parent]
    items = []
    for row in numbered(path):
        for name in ("text", "label"):
            row.text(name)
        name = row.image_name("image") or row.text("image")
        row.reject_other_images(("image",), has_image=True)
        image = find_image(folders, row, name)
        items.append(_item(row, category, name, image, ("text", "label")))
    reject_duplicates((item.id for item in items), str(path))
    return items


def _item(row: Record, category: str, name: str, image: ImageSource, keys: tuple[str, str]) -> Item:
    question_key, label_key = keys
    question = row.text(question_key)
    return Item(
        id=f"{category}/{row.text('question_id')}",
        image=image,
        prompt=f"{question}\n{scoring.SHORT_ANSWER}",
        answers=(gold_yes_no(row.text(label_key), row, label_key),),
        group=name,
        category=category,
        question=question,
        details={"question_id": row.get("question_id"), "image": name},
        choices=scoring.YES_NO,
    )


def parse(item: Item, text: str) -> str | None:
    """Return "yes" or "no" by POPE's own rule, which takes anything that is not a no for yes."""
    return parse_yes_no(text, "official")


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 if right. ``text`` None is a failed sample, always wrong."""
    said = None if text is None else parse(item, text)
    strict = None if text is None else parse_yes_no(text, "strict")
    return scoring.judged(
        item, text, said, float(said in item.answers), strict is not None, {"strict": strict}
    )


def _counts(label: str, said: str | None) -> list[float]:
    """Return true positive, false positive, false negative, true negative of one answer."""
    # what is neither yes nor no is wrong for both labels
    if label == "yes":
        return [float(said == "yes"), 0.0, float(said != "yes"), 0.0]
    return [0.0, float(said != "no"), 0.0, float(said == "no")]


def _f1(sums: statistics.Array) -> statistics.Array:
    positive, false_positive, false_negative = sums[:, 0], sums[:, 1], sums[:, 2]
    total = 2 * positive + false_positive + false_negative
    return np.divide(2 * positive, total, out=np.zeros(len(sums)), where=total > 0)


def headline_sums(rows: Sequence[Row]) -> statistics.Array:
    """Return [images, 4 * categories]: the four counts of each category present."""
    present = [name for name in CATEGORIES if any(row.category == name for row in rows)]
    table = np.zeros((len(rows), _N_COUNTS * len(present)))
    for place, row in enumerate(rows):
        start = _N_COUNTS * present.index(row.category)
        table[place, start : start + _N_COUNTS] = _counts(row.answers[0], row.parsed)
    return statistics.sum_by_group(table, [row.group for row in rows])


def headline(sums: statistics.Array) -> statistics.Array:
    """Return the unweighted mean of the categories' F1 from sums [R, 4 * categories]."""
    starts = range(0, sums.shape[1], _N_COUNTS)
    return np.mean([_f1(sums[:, start : start + _N_COUNTS]) for start in starts], axis=0)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _metrics(labels: Sequence[str], said: Sequence[str | None]) -> dict[str, float]:
    pairs = zip(labels, said, strict=True)
    positive, false_positive, false_negative, negative = np.sum(
        [_counts(label, answer) for label, answer in pairs], axis=0
    )
    return {
        "accuracy": _ratio(positive + negative, len(labels)),
        "precision": _ratio(positive, positive + false_positive),
        "recall": _ratio(positive, positive + false_negative),
        "f1": _ratio(2 * positive, 2 * positive + false_positive + false_negative),
        "yes_ratio": _ratio(list(said).count("yes"), len(labels)),
    }


def _category(rows: Sequence[Row]) -> dict[str, Any]:
    labels = [row.answers[0] for row in rows]
    strict = _metrics(labels, [row.details["strict"] for row in rows])
    interval = statistics.bootstrap_interval(headline_sums(rows), headline)
    accuracy = statistics.mean_interval([row.score for row in rows], [row.group for row in rows])
    return {
        **_metrics(labels, [row.parsed for row in rows]),
        "f1_interval_95": list(interval),
        "accuracy_interval_95": list(accuracy),
        "label_yes_ratio": _ratio(labels.count("yes"), len(labels)),
        "strict_accuracy": strict["accuracy"],
        "strict_f1": strict["f1"],
        "off_format_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
        "n": len(rows),
    }


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and breakdown of all rows of the bench."""
    parts = split_rows(rows, [row.category for row in rows])
    details = {name: _category(parts[name]) for name in CATEGORIES if name in parts}
    sums = headline_sums(rows)
    said = [row.parsed for row in rows]
    return {
        "metric": METRIC,
        "score": statistics.total(sums, headline),
        "interval_95": list(statistics.bootstrap_interval(sums, headline)),
        "n": len(rows),
        "by_category": {name: part["f1"] for name, part in details.items()},
        "by_category_details": details,
        "missing_categories": [name for name in CATEGORIES if name not in parts],
        "accuracy": sum(row.score for row in rows) / len(rows),
        "yes_ratio": said.count("yes") / len(rows),
        "strict_f1": float(np.mean([part["strict_f1"] for part in details.values()])),
        "off_format_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the mean F1 of the better constant answer, which is always "yes"."""
    return float(summarize([judge(item, "yes") for item in items])["score"])


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return one answer file a category, in the form of POPE's own scorer."""
    files: Files = {}
    for item, text in scoring.answered(items, texts):
        row = {
            "question_id": item.details["question_id"],
            "question": item.question,
            "answer": text,
        }
        files.setdefault(f"pope_{item.category}_answers.jsonl", []).append(row)
    return files
