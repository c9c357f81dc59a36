"""MMBench and MMBench-CN: lettered questions, right only if right in every rotation.

Official file: a TSV with ``index, question, hint, A, B, C, D, answer, category, image, ...``. The
rotated copies of a question are rows of the file, ``index = base + k * 1_000_000``.
"""

import importlib.util
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import most_common, parse_option
from milora_vl.eval.bench_files import (
    Mirror,
    find_tsv,
    is_chinese,
    known,
    picture,
    read_tsv,
    resolve_image,
    rows_without,
)
from milora_vl.eval.items import (
    ImageSource,
    Item,
    Row,
    reject_duplicates,
    split_rows,
    take_sample,
)
from milora_vl.files import write_text_atomic

logger = logging.getLogger(__name__)

VERSION = 1
METRIC = "circular_accuracy"
MAX_NEW_TOKENS = 8
MIRRORS = (Mirror("MMBench", "en", "dev"),)
MIRRORS_CN = (Mirror("MMBench", "cn", "dev"),)

_SUFFIX_CN = "请直接回答选项字母。"
_ROTATION_STEP = 1_000_000


def load(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read the questions, all rotations included.

    Args:
        data_dir: Folder with the TSV, or the TSV; None: hub mirror of the dev split.
        limit: Number of base questions; each comes with all its rotations.

    Raises:
        FileNotFoundError: If there is no TSV.
        MirrorError: If the mirror cannot be loaded.
        ValueError: If a column is missing, or an index is not a number or occurs twice.
    """
    return _load(data_dir, limit, chinese=False)


def load_chinese(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read the Chinese questions; see ``load``."""
    return _load(data_dir, limit, chinese=True)


def _load(data_dir: Path | None, limit: int | None, *, chinese: bool) -> list[Item]:
    if data_dir is None:
        (mirror,) = MIRRORS_CN if chinese else MIRRORS
        table, name = mirror.open(), f"MMBench-{mirror.config} mirror"
        rows = [known(row) for row in rows_without(table, "image")]
        sources = [picture(table, place, f"{name} row {place}") for place in range(len(rows))]
    else:
        path = find_tsv(data_dir, chinese=chinese)
        name, chinese = path.name, is_chinese(path.name)
        rows, sources = read_tsv(path), None
    indices = [_index(row, f"{name} row {number}") for number, row in enumerate(rows, start=1)]
    reject_duplicates(indices, str(data_dir or name))
    images = {index: row.get("image") for index, row in zip(indices, rows, strict=True)}
    items = []
    for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
        where = f"{name} row {place + 1} (index {index})"
        encoded = ImageSource(where, encoded=resolve_image(images, index))
        items.append(_item(row, index, sources[place] if sources else encoded, chinese))
    kept = set(take_sample(list(dict.fromkeys(item.group for item in items)), limit))
    items = [item for item in items if item.group in kept]
    _warn_about_rotations(items, str(data_dir or name))
    return items


def _index(row: Mapping[str, str], where: str) -> int:
    try:
        return int(float(row["index"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: the index is not a number: {row.get('index')!r}") from error


def _item(row: Mapping[str, str], index: int, image: ImageSource, chinese: bool) -> Item:
    lettered = {name: row[name] for name in takewhile(row.__contains__, scoring.LETTERS)}
    group = row.get("g_index", str(index % _ROTATION_STEP))
    question = row.get("question", "")
    lines = [row["hint"]] if "hint" in row else []
    lines += [question, *scoring.lettered(list(lettered.values()))]
    lines.append(_SUFFIX_CN if chinese else scoring.LETTER_ANSWER)
    answer = row.get("answer", "").strip()
    return Item(
        id=str(index),
        image=image,
        prompt="\n".join(lines),
        answers=(answer,) if answer else (),
        group=group,
        category=row.get("category", "all"),
        options=tuple(lettered.values()),
        question=question,
        details={
            "l2": row.get("l2-category", row.get("L2-category", "all")),
            "rotation": index // _ROTATION_STEP,
            "answer_text": lettered.get(answer),
        },
        choices=tuple(lettered),
    )


def _warn_about_rotations(items: Sequence[Item], path: str) -> None:
    rows = defaultdict(list)
    for item in items:
        rows[item.group].append(item)
    odd = sum(len(members) != len(members[0].options) for members in rows.values())
    if odd:
        logger.warning(
            "%s: %d of %d questions lack a rotated row or an option", path, odd, len(rows)
        )


def parse(item: Item, text: str) -> str | None:
    """Return the chosen letter, or None."""
    return parse_option(text, item.options)


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 for the right letter. ``text`` None is a failed sample, always wrong."""
    letter = None if text is None else parse(item, text)
    is_right = letter is not None and letter in item.answers
    is_bare = scoring.is_bare_letter(text, len(item.options))
    return scoring.judged(item, text, letter, float(is_right), is_bare)


def headline_sums(rows: Sequence[Row]) -> statistics.Array:
    """Return [G, 2]: whether all rotations of a question are right, and 1; groups sorted."""
    return np.array([[min(group), 1.0] for _, group in sorted(_scores(rows).items())])


def headline(sums: statistics.Array) -> statistics.Array:
    """Return circular accuracy from sums [R, 2]."""
    return statistics.ratio(sums)


def _scores(rows: Sequence[Row]) -> dict[str, list[float]]:
    scores = defaultdict(list)
    for row in rows:
        scores[row.group].append(row.score)
    return dict(scores)


def _circular(rows: Sequence[Row]) -> dict[str, Any]:
    sums = headline_sums(rows)
    interval = statistics.bootstrap_interval(sums, headline)
    return {"score": float(sums[:, 0].mean()), "interval_95": list(interval), "n": len(sums)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and breakdown of all rows of the bench."""
    parts = split_rows(rows, [row.category for row in rows])
    by_category = {name: _circular(part) for name, part in parts.items()}
    by_l2 = split_rows(rows, [row.details["l2"] for row in rows])
    chosen = [row.parsed for row in rows]
    has_rotations = any(row.details["rotation"] for row in rows)
    return {
        "metric": METRIC if has_rotations else "accuracy",
        **_circular(rows),
        "n_rows": len(rows),
        "by_category": {name: part["score"] for name, part in by_category.items()},
        "by_category_details": by_category,
        "by_l2": {name: _circular(part)["score"] for name, part in by_l2.items()},
        "vanilla_circ0": scoring.mean_score([row for row in rows if row.details["rotation"] == 0]),
        "vanilla_all": scoring.mean_score(rows),
        "off_letter_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
        "unparsed_rate": chosen.count(None) / len(rows),
        "letter_share": {
            letter: chosen.count(letter) / len(rows) for letter in sorted(set(chosen) - {None})
        },
    }


def majority(items: Sequence[Item]) -> float:
    """Return the circular accuracy of the best guess that never looks at picture or question.

    In each category: always the text that is right most often (where it is not offered, one of
    the options at random), or one option at random, whichever is better. The guesser may stay
    with its choice through the rotations.
    """
    base: dict[str, Item] = {}
    for item in items:
        base.setdefault(item.group, item)
    parts = defaultdict(list)
    for item in base.values():
        parts[item.category].append(item)
    return sum(_best_constant(part) for part in parts.values()) / len(base)


def _best_constant(items: Sequence[Item]) -> float:
    chance = sum(1 / max(1, len(item.options)) for item in items)
    texts = [text for item in items if (text := item.details["answer_text"])]
    if not texts:
        return chance
    guess = most_common(texts)
    credit = sum(
        float(item.details["answer_text"] == guess)
        if guess in item.options
        else 1 / max(1, len(item.options))
        for item in items
    )
    return max(chance, credit)


def write_submission(
    items: Sequence[Item],
    texts: Mapping[str, str | None],
    out_dir: Path,
    data_dir: Path | None = None,
) -> list[Path]:
    """Write what the evaluation server takes: the questions with a column ``prediction``.

    Returns:
        The TSV and, if ``openpyxl`` is installed, the XLSX.
    """
    del data_dir
    table = pd.DataFrame(
        {
            "index": int(item.id),
            "question": item.question,
            **dict(zip(scoring.LETTERS, item.options, strict=False)),
            "category": item.category,
            "l2-category": item.details["l2"],
            "prediction": texts[item.id],
        }
        for item in items
    )
    path = out_dir / "mmbench_submission.tsv"
    write_text_atomic(path, table.to_csv(sep="\t", index=False))
    if importlib.util.find_spec("openpyxl") is None:
        return [path]
    sheet = path.with_suffix(".xlsx")
    temporary = out_dir / ".mmbench_submission.part.xlsx"
    table.to_excel(temporary, index=False)
    temporary.replace(sheet)
    return [path, sheet]
