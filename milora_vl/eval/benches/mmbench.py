"""MMBench and MMBench-CN: lettered questions, right only if right in every rotation.

Official file: a TSV with ``index, question, hint, A, B, C, D, answer, category, image, ...``. The
rotated copies of a question are rows of the file, ``index = base + k * 1_000_000``.
"""

import ast
import importlib.util
import io
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import most_common, parse_option
from milora_vl.eval.bench_files import (
    BenchError,
    Mirror,
    Record,
    find_file,
    gold_letter,
    holds_image,
    is_encoded,
    is_missing,
    reject_duplicates,
    rows_without,
    shorten,
    table_image,
)
from milora_vl.eval.items import ImageSource, Item, Row, split_rows, take_groups
from milora_vl.eval.scoring import Files, Texts

logger = logging.getLogger(__name__)

FILES = "*mmbench*.tsv, rotated rows included, as published"
VERSION = 1
METRIC = "circular_accuracy"
MAX_NEW_TOKENS = 8
MIRRORS = (Mirror("MMBench", "en", "dev"),)
MIRRORS_CN = (Mirror("MMBench", "cn", "dev"),)

_SUFFIX_CN = "请直接回答选项字母。"
_ROTATION_STEP = 1_000_000
_LONGEST_REFERENCE_CHARS = 64
_LOST_ANSWER = "answer that reads as missing"
_MISSING_WORDS = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""What pandas reads as no value unless it is told otherwise."""


def load(data_dir: Path | None, *, chinese: bool = False) -> list[Item]:
    """Read the questions, all rotations included.

    Args:
        data_dir: Folder with the TSV, or the TSV.
        chinese: Read the Chinese questions; of one TSV its name decides.
    """
    sources: list[ImageSource] | None = None
    if data_dir is None:
        (mirror,) = MIRRORS_CN if chinese else MIRRORS
        table, name = mirror.open(), f"MMBench-{mirror.config} mirror"
        values = [_present(row) for row in rows_without(table, "image")]
        sources = [table_image(table, i, f"{name} row {i}") for i in range(len(values))]
    else:
        path = _find_tsv(data_dir, chinese=chinese)
        name, chinese = path.name, _is_chinese(path.name)
        values = _read_tsv(path)
    rows = [Record(row, f"{name} row {number}") for number, row in enumerate(values, start=1)]
    indices = [_index(row) for row in rows]
    reject_duplicates(indices, str(data_dir or name))
    images = {index: _image(row) for index, row in zip(indices, rows, strict=True)}
    resolved = {index: _resolve_image(images, index) for index in images}
    groups = _groups(indices, rows, resolved)
    items = []
    for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
        row = Record(row.values, f"{row.where} (index {index})")
        source = sources[place] if sources else ImageSource(row.where, encoded=resolved[index])
        items.append(_item(row, index, groups[index], source, chinese))
    _check_labels(items)
    _warn_about_rotations(items, str(data_dir or name))
    return items


sample = take_groups
"""A limit counts base questions; each comes with all its rotations."""


def _find_tsv(data_dir: Path, *, chinese: bool) -> Path:
    """Return the TSV: ``data_dir`` itself, or the one with "mmbench" in its name in that folder."""
    if data_dir.is_file():
        return data_dir
    patterns = ("mmbench.tsv", "*[mM][mM][bB]ench*.tsv")
    folders = (".", "mmbench", "MMBench", *(("mmbench_cn",) if chinese else ()))
    path = find_file(data_dir, folders, patterns, lambda name: _is_chinese(name) == chinese)
    if path is None:
        language = "Chinese" if chinese else "English"
        raise FileNotFoundError(f"no {language} *mmbench*.tsv in {data_dir} or its folder mmbench")
    return path


def _is_chinese(name: str) -> bool:
    return bool(re.search(r"(?i)(?:^|[_-])(?:cn|cc)(?:[_.-]|$)", name))


def _read_tsv(path: Path) -> list[dict[str, str]]:
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, encoding="utf-8-sig", keep_default_na=False)
    except (ValueError, OSError) as error:  # those of pandas and of UTF-8 are ValueErrors
        raise BenchError(f"{path}: cannot be read as a table: {error}") from error
    missing = {"index", "question", "A", "B", "image"} - set(table.columns)
    if missing:
        raise BenchError(f"{path}: no column {', '.join(sorted(missing))}")
    rows = []
    for raw in table.to_dict("records"):
        # Missing values as the official loaders parse them: an option "None" is not offered.
        row = {name: cell for name, cell in raw.items() if cell not in _MISSING_WORDS}
        label = raw.get("answer", "").strip()
        if label not in row and raw.get(label):
            row[_LOST_ANSWER] = label
        rows.append(row)
    return rows


def _present(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop missing values, which mirrors also write as the word "nan"."""
    return {name: value for name, value in row.items() if not is_missing(value) and value != "nan"}


def _index(row: Record) -> int:
    text = row.text("index").strip()
    if not re.fullmatch(r"\d{1,15}(?:\.0+)?", text):
        raise row.error(f"the index is not a number: {shorten(repr(text))}")
    return int(text.split(".")[0])


def _image(row: Record) -> str | None:
    """Return the base64 text of a row's image, or the index of the row that has it."""
    value = row.values.get("image")
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            names = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise row.error(f"image is no list: {shorten(repr(value))}") from error
        row = Record({**row.values, "image": names}, row.where)
    name = row.image_name("image")
    row.reject_other_images(("image",), has_image=True)
    is_file = name is not None and not is_encoded(name) and holds_image(name)
    if is_file:
        raise row.error(f"image {shorten(repr(name))} is a file name; base64 text was expected")
    return name


def _resolve_image(images: Mapping[int, str | None], index: int) -> str | None:
    """Follow short "images", which are the index of the row that holds the image."""
    seen = {index}
    image = images[index]
    while image and len(image) <= _LONGEST_REFERENCE_CHARS and image.strip().isdecimal():
        target = int(image)
        if target in seen or target not in images:
            return None
        seen.add(target)
        image = images[target]
    return image


def _groups(
    indices: Sequence[int], rows: Sequence[Record], images: Mapping[int, str | None]
) -> dict[int, str]:
    """Return which question each row belongs to: its base's, if it is a rotation of it.

    Two questions may differ by a multiple of a million by chance, where a file has ids of its own:
    a rotation has the question, the image and the options of its base.
    """
    by_index = dict(zip(indices, rows, strict=True))
    bases: dict[int, int] = {}
    for index in sorted(indices):
        bases.setdefault(index % _ROTATION_STEP, index)
    groups, strangers = {}, []
    for index, row in by_index.items():
        base = bases[index % _ROTATION_STEP]
        group = str(index % _ROTATION_STEP)
        is_same = base == index or (
            images[base] == images[index] and _is_rotation(by_index[base], row)
        )
        if not is_same and not row.has("g_index"):
            group = str(index)
            strangers.append(index)
        groups[index] = row.text("g_index", group)
    if strangers:
        logger.warning(
            "%d rows have the index of a rotation but another question, image or options, the "
            "first is index %d: each counts as a question of its own",
            *(len(strangers), strangers[0]),
        )
    return groups


def _is_rotation(base: Record, row: Record) -> bool:
    if base.text("question").split() != row.text("question").split():
        return False
    # rotations move the texts between the letters, so one in common is enough
    options = [{one.text(name) for name in scoring.LETTERS if one.has(name)} for one in (base, row)]
    return bool(options[0] & options[1]) or not any(options)


def _item(row: Record, index: int, group: str, image: ImageSource, chinese: bool) -> Item:
    lettered = {name: row.text(name) for name in takewhile(row.has, scoring.LETTERS)}
    question = row.text("question")
    lines = [row.text("hint")] if row.has("hint") else []
    lines += [question, *scoring.lettered(list(lettered.values()))]
    lines.append(_SUFFIX_CN if chinese else scoring.LETTER_ANSWER)
    answer = _label(row, lettered) if row.has("answer") else None
    # of a row that is no rotation after all, the index says nothing
    is_own = "g_index" not in row.values and group == str(index)
    return Item(
        id=str(index),
        image=image,
        prompt="\n".join(lines),
        answers=() if answer is None else (answer,),
        group=group,
        category=row.text("category", "all"),
        options=tuple(lettered.values()),
        question=question,
        details={
            "l2": row.text("l2-category", row.text("L2-category", "all")),
            "rotation": 0 if is_own else index // _ROTATION_STEP,
            "answer_text": lettered.get(answer or ""),
        },
        choices=tuple(lettered),
    )


def _label(row: Record, lettered: Mapping[str, str]) -> str:
    answer = row.text("answer").strip()
    if answer in scoring.LETTERS and answer not in lettered and row.has(_LOST_ANSWER, answer):
        # It, or one before it, reads as missing ("None"): the official prompt does not offer it.
        logger.warning("%s: answer %s is not among the options shown", row.where, answer)
        return answer
    return gold_letter(answer, list(lettered.values()), row)


def _check_labels(items: Sequence[Item]) -> None:
    """Check that a question has a label in all of its rotations, or in none."""
    labelled = {item.group for item in items if item.answers}
    for item in items:
        if item.group in labelled and not item.answers:
            where = item.image.where if item.image else item.id
            raise BenchError(f"{where}: no answer, but a rotation of this question has one")


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


def _scores(rows: Sequence[Row]) -> dict[str, list[float]]:
    scores = defaultdict(list)
    for row in rows:
        scores[row.group].append(row.score)
    return dict(scores)


def _circular(rows: Sequence[Row]) -> dict[str, Any]:
    sums = headline_sums(rows)
    interval = statistics.bootstrap_interval(sums)
    return {"score": float(sums[:, 0].mean()), "interval_95": list(interval), "n": len(sums)}


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
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
    """Return the circular accuracy of the best guess that never looks at image or question.

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


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return what the evaluation server takes: the questions with a column ``prediction``.

    It is a TSV and, if ``openpyxl`` is installed, an XLSX.
    """
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
    files: Files = {"mmbench_submission.tsv": table.to_csv(sep="\t", index=False)}
    if importlib.util.find_spec("openpyxl") is not None:
        sheet = io.BytesIO()
        table.to_excel(sheet, index=False)
        files["mmbench_submission.xlsx"] = sheet.getvalue()
    return files


VARIANTS = {"mmbench-cn": {"FILES": "the same, *cn*", "load": partial(load, chinese=True)}}
