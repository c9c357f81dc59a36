"""MME: two yes/no questions an image, one of each; points a category, up to 200.

Official layout: a folder a category with ``{stem}.txt`` (two lines "question<TAB>Yes|No") beside
the images, or in ``questions_answers_YN/`` with the images in ``images/``. The score is the sum
of the ten perception categories, each 100 * accuracy + 100 * share of images with both right.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import parse_yes_no
from milora_vl.eval.bench_files import (
    BenchError,
    Mirror,
    Record,
    gold_yes_no,
    read_mirror,
    read_text,
)
from milora_vl.eval.items import ImageSource, Item, Row, split_rows, take_groups
from milora_vl.eval.scoring import Files, Texts

FILES = "a folder a category below MME_Benchmark_release_version"
VERSION = 1
METRIC = "perception_points"
MAX_NEW_TOKENS = 8
MIRRORS = (Mirror("MME", None, "test"),)
PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)

_FOLDERS = (".", "MME_Benchmark_release_version", "MME", "mme", "MME_Benchmark")
_SUFFIXES = (".jpg", ".png", ".jpeg")
_REQUEST = re.compile(r"\s*Please answer yes or no\.?\s*$")
_N_COUNTS = 4  # right, asked, images with both right, images
_PER_CATEGORY = 200.0


def load(data_dir: Path | None) -> list[Item]:
    """Read the questions.

    Args:
        data_dir: Folder with the categories' folders, or one above it.
    """
    items = _from_files(data_dir) if data_dir is not None else _from_mirror()
    _check_pairs(items)
    return items


def sample(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return a sample of ``limit`` questions, rounded up to whole images."""
    return take_groups(items, None if limit is None else (limit + 1) // 2)


def _from_files(data_dir: Path) -> list[Item]:
    categories = (*PERCEPTION, *COGNITION)
    candidates = [data_dir / one / two for one in _FOLDERS for two in _FOLDERS]
    roots = [path for path in candidates if any((path / name).is_dir() for name in categories)]
    if not roots:
        raise FileNotFoundError(
            f"no folder of an MME category ({', '.join(categories[:3])}, ...) in {data_dir} or "
            "its folder MME_Benchmark_release_version"
        )
    items = []
    for category in categories:
        folder = roots[0] / category
        nested = folder / "questions_answers_YN"
        for file in sorted((nested if nested.is_dir() else folder).glob("*.txt")):
            image = _find_image(folder / "images" if nested.is_dir() else folder, file)
            for number, line in enumerate(_lines(file)):
                where = f"{category}/{file.name} line {number + 1}"
                question, _, answer = line.rpartition("\t")
                row = Record({"question": question, "answer": answer}, where)
                source = ImageSource(where, path=image)
                items.append(_item(category, file.stem, number, row, source))
    return items


def _lines(file: Path) -> list[str]:
    return [line for line in read_text(file).split("\n") if line.strip()]


def _find_image(folder: Path, file: Path) -> Path:
    names = [folder / f"{file.stem}{suffix}" for suffix in _SUFFIXES]
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise BenchError(f"{file}: no image {file.stem} (.jpg, .png) in {folder}")
    return found


def _from_mirror() -> list[Item]:
    items, seen = [], {}
    for row, source in read_mirror(MIRRORS, "MME"):
        category, stem = row.text("category"), row.text("question_id").rpartition("/")[2]
        if category not in (*PERCEPTION, *COGNITION):
            raise row.error(f"category {category!r} is not one of MME's")
        number = seen[category, stem] = seen.get((category, stem), -1) + 1
        items.append(_item(category, stem, number, row, source))
    return items


def _item(category: str, stem: str, number: int, row: Record, image: ImageSource) -> Item:
    # a line without a tab is all answer, so the label is looked at first
    label = gold_yes_no(row.text("answer"), row, "answer")
    question = row.text("question").strip()
    asked = _REQUEST.sub("", question)
    return Item(
        id=f"{category}/{stem}/{number}",
        image=image,
        prompt=f"{asked}\n{scoring.SHORT_ANSWER}",
        answers=(label,),
        group=f"{category}/{stem}",
        category=category,
        question=question,
        choices=scoring.YES_NO,
    )


def _check_pairs(items: Sequence[Item]) -> None:
    counts = Counter(item.group for item in items)
    odd = [group for group, n in counts.items() if n != 2]
    if odd:
        raise BenchError(f"MME {odd[0]}: {counts[odd[0]]} questions, two an image expected")


def parse(item: Item, text: str) -> str | None:
    """Return yes or no by MME's rule: the whole answer, else within its first four characters."""
    said = text.lower()
    if said in ("yes", "no"):
        return said
    return next((word for word in ("yes", "no") if word in said[:4]), None)


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 if right. ``text`` None is a failed sample, always wrong."""
    said = None if text is None else parse(item, text)
    is_formed = text is not None and parse_yes_no(text, "strict") is not None
    return scoring.judged(item, text, said, float(said in item.answers), is_formed)


def headline_sums(rows: Sequence[Row]) -> statistics.Array:
    """Return [images, 4 * perception categories]: the four counts; groups sorted."""
    return _sums(rows, PERCEPTION)


def _sums(rows: Sequence[Row], categories: Sequence[str]) -> statistics.Array:
    kept = [row for row in rows if row.category in categories]
    present = [name for name in categories if any(row.category == name for row in kept)]
    pairs: dict[str, list[Row]] = {}
    for row in kept:
        pairs.setdefault(row.group, []).append(row)
    table = np.zeros((len(pairs), _N_COUNTS * len(present)))
    for place, (_, pair) in enumerate(sorted(pairs.items())):
        start = _N_COUNTS * present.index(pair[0].category)
        scores = [row.score for row in pair]
        # both questions of an image are right if the lower score is 1
        table[place, start : start + _N_COUNTS] = [sum(scores), len(scores), min(scores), 1.0]
    return table


def headline(sums: statistics.Array) -> statistics.Array:
    """Return points from sums [R, 4 * categories]: accuracy and pair accuracy, a hundred each.

    A small category that a resample does not hold counts as the mean of the others, not as zero.
    """
    points, n_categories = np.zeros(len(sums)), sums.shape[1] // _N_COUNTS
    n_present = np.sum(sums[:, 1::_N_COUNTS] > 0, axis=1)
    for start in range(0, sums.shape[1], _N_COUNTS):
        for column in (start, start + 2):
            points += 100 * statistics.ratio(sums[:, column : column + 2])
    return points * n_categories / np.maximum(n_present, 1)


def _points(rows: Sequence[Row], categories: Sequence[str]) -> dict[str, Any]:
    sums = _sums(rows, categories)
    if not len(sums):
        return {"score": None, "interval_95": None}
    score = statistics.total(sums, headline)
    interval = statistics.bootstrap_interval(sums, headline)
    return {"score": score, "interval_95": list(interval)}


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return perception points, interval, points a category, and the cognition points."""
    parts = split_rows(rows, [row.category for row in rows])
    present = [name for name in (*PERCEPTION, *COGNITION) if name in parts]
    details = {name: _points(parts[name], (name,)) for name in present}
    said = [row.parsed for row in rows]
    return {
        "metric": METRIC,
        **_points(rows, PERCEPTION),
        "maximum": _PER_CATEGORY * sum(name in parts for name in PERCEPTION),
        "n": len(rows),
        "by_category": {name: part["score"] for name, part in details.items()},
        "by_category_details": details,
        "cognition": _points(rows, COGNITION),
        "missing_categories": [name for name in (*PERCEPTION, *COGNITION) if name not in parts],
        "accuracy": sum(row.score for row in rows) / len(rows),
        "yes_ratio": said.count("yes") / len(rows),
        "off_format_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the points of the better constant answer; one of each pair is right, never both."""
    said = ([judge(item, text) for item in items] for text in ("yes", "no"))
    return max(summarize(rows)["score"] or 0.0 for rows in said)


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return one file a category for scoring elsewhere: image, question, label, answer."""
    files: Files = {}
    for item, text in scoring.answered(items, texts):
        row = {
            "image": item.group.rpartition("/")[2],
            "question": item.question,
            "label": item.answers[0],
            "answer": text,
        }
        files.setdefault(f"mme/{item.category}.jsonl", []).append(row)
    return files
