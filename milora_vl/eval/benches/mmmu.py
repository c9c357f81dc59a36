"""MMMU: college questions of 30 subjects, lettered or open.

Official layout: parquet files with ``validation`` (or ``test``) in their names, one folder a
subject or all in one. ``mmmu`` shows all images of a question, in order before its text, where
marks such as "<image 1>" stay. ``mmmu-first`` shows the first alone, as its authors did for LLaVA.
Options are written "A. text" as in LLaVA's other prompts, where the authors' own has "(A) text".
"""

import ast
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring
from milora_vl.eval.answers import is_open_answer_right, parse_choice
from milora_vl.eval.bench_files import (
    BenchError,
    Mirror,
    Record,
    check_options,
    gold_letter,
    keep_encoded,
    reject_duplicates,
    rows_without,
    shorten,
    table_image,
)
from milora_vl.eval.items import Item, Row
from milora_vl.eval.scoring import Files, Texts

FILES = "*validation*.parquet"
VERSION = 2
METRIC = "accuracy"
MAX_NEW_TOKENS = 32
MIRRORS = (Mirror("MMMU", None, "validation"),)

_FOLDERS = ("mmmu", "MMMU", ".")
_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_NOT_PUBLISHED = "?"


def load_first(data_dir: Path | None) -> list[Item]:
    """Read the questions, each with its first image alone."""
    return [replace(item, more_images=()) for item in load(data_dir)]


def load(data_dir: Path | None) -> list[Item]:
    """Read the questions.

    Args:
        data_dir: Folder with ``*validation*.parquet`` (else ``*test*.parquet``), at any depth below
            it or its folder ``mmmu``; or one such file.
    """
    if data_dir is None:
        table, label = MIRRORS[0].open(), "MMMU mirror"
    else:
        table, label = _open_files(data_dir)
    items = []
    has = _find_images(table)
    for place, values in enumerate(rows_without(table, *_IMAGES)):
        row = Record(values, f"{label} row {place} ({values.get('id')})")
        row.reject_other_images((), has_image=True)
        items.append(_item(row, table, place, [name for name in _IMAGES if has[name][place]]))
    reject_duplicates((item.id for item in items), label)
    return items


def _open_files(data_dir: Path) -> tuple[Any, str]:
    import datasets

    files = [data_dir] if data_dir.is_file() else []
    for split in ("validation", "test"):
        for folder in _FOLDERS:
            is_own = folder != "." or "mmmu" in data_dir.resolve().name.lower()
            if not files and is_own:
                files = sorted((data_dir / folder).glob(f"**/*{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"no *validation*.parquet in {data_dir} or its folders mmmu, MMMU")
    label = files[0].name if len(files) == 1 else f"MMMU ({len(files)} files)"
    try:
        table = keep_encoded(datasets.Dataset.from_parquet([str(file) for file in files]))
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
        raise BenchError(f"{files[0]}: cannot be read as parquet: {error}") from error
    if _IMAGES[0] not in table.column_names:
        raise BenchError(f"{files[0]}: no column {_IMAGES[0]}")
    return table, label


def _find_images(table: Any) -> dict[str, list[bool]]:
    """Return, for each image column, which rows hold an image; no image is read.

    The first is taken to be there: a row without it is an error when it is asked.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    has = {}
    for name in _IMAGES:
        column = table.data.column(name) if name in table.column_names else None
        if column is None or not pa.types.is_struct(column.type):  # null if no row has an image
            has[name] = [False] * len(table)
            continue
        parts = [pc.is_valid(pc.struct_field(column, part)) for part in ("bytes", "path")]
        has[name] = pc.and_(pc.is_valid(column), pc.or_(*parts)).to_pylist()
    has[_IMAGES[0]] = [True] * len(table)
    return has


def _item(row: Record, table: Any, place: int, names: Sequence[str]) -> Item:
    question = row.text("question")
    options = _read_list(row, "options") if row.has("options") else ()
    kind = row.text("question_type")
    if kind not in ("multiple-choice", "open"):
        raise row.error(f"question_type {kind!r} is neither multiple-choice nor open")
    is_lettered = kind == "multiple-choice"
    options = check_options(options, row) if is_lettered else ()
    lines = [question, *scoring.lettered(options)]
    lines.append(scoring.LETTER_ANSWER if is_lettered else scoring.SHORT_ANSWER)
    key = row.text("id")
    answers = _read_answers(row)
    image, *more = (table_image(table, place, row.where, itemgetter(name)) for name in names)
    return Item(
        id=key,
        image=image,
        prompt="\n".join(lines),
        answers=tuple(gold_letter(one, options, row) for one in answers) if options else answers,
        group=key,
        category=_subject(key),
        options=options,
        question=question,
        details={"question_type": "lettered" if is_lettered else "open"},
        choices=tuple(scoring.LETTERS[: len(options)]),
        more_images=tuple(more),
    )


def _read_list(row: Record, key: str) -> tuple[str, ...]:
    """Read a list that the file keeps as text; nothing in it is run."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value or "[]")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise row.error(f"{key} are not a list: {shorten(repr(value))}") from error
    return Record({key: value}, row.where).texts(key)


def _read_answers(row: Record) -> tuple[str, ...]:
    if not row.has("answer") or row.values["answer"] in ("", _NOT_PUBLISHED):
        return ()
    value = row.values["answer"]
    is_list = not isinstance(value, (str, int, float)) or str(value).startswith("[")
    answers = _read_list(row, "answer") if is_list else (row.text("answer"),)
    if not answers or not all(one.strip() for one in answers):
        # every text holds an empty one, so that any answer at all would be right
        raise row.error(f"answer {shorten(repr(value))} has an empty part")
    return answers


def _subject(key: str) -> str:
    """Return "Art_Theory" of "validation_Art_Theory_3"."""
    return "_".join(key.split("_")[1:-1]) or "all"


def parse(item: Item, text: str) -> str | None:
    """Return the letter by MMMU's rule, None where that rule draws one; an open answer as it is."""
    return parse_choice(text, item.options) if item.choices else text.strip() or None


def judge(item: Item, text: str | None) -> Row:
    """Score one answer. ``text`` None is a failed sample, always wrong.

    Where no letter can be told the official scorer draws one at random. That is luck of the draw:
    here such an answer gets none, and ``unparsed_rate`` says how many there are.
    """
    said = None if text is None else parse(item, text)
    if item.choices:
        is_right = said is not None and said in item.answers
        is_formed = scoring.is_bare_letter(text, len(item.options))
    else:
        is_right = text is not None and is_open_answer_right(text, item.answers)
        is_formed = bool(said)
    return scoring.judged(item, text, said, float(is_right), is_formed)


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over questions, interval, breakdown by subject and by question type."""
    unparsed = sum(row.parsed is None for row in rows)
    return {
        **scoring.summarize_mean(
            rows, METRIC, by_question_type=lambda row: row.details["question_type"]
        ),
        "unparsed_rate": unparsed / len(rows),
    }


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return the JSON object that the evaluation server takes: id -> letter or text."""
    said = {item.id: parse(item, text) or "" for item, text in scoring.answered(items, texts)}
    return {"mmmu_submission.json": said}


VARIANTS = {"mmmu-first": {"FILES": "the same: one image a question", "load": load_first}}
