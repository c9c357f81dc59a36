"""MMMU: college questions of 30 subjects, lettered or open.

Official layout: parquet files with ``validation`` (or ``test``) in their names, one folder a
subject or all in one. Only the first picture of a question is shown, as its authors did for
LLaVA; marks such as "<image 1>" stay in the text. Options are written "A. text" as in LLaVA's other
prompts, where the authors' own has "(A) text".
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import is_open_answer_right, parse_choice
from milora_vl.eval.bench_files import Mirror, keep_encoded, picture, rows_without
from milora_vl.eval.items import Item, Row, reject_duplicates, require, take_sample

VERSION = 1
METRIC = "accuracy"
MAX_NEW_TOKENS = 32
MIRRORS = (Mirror("MMMU", None, "validation"),)

_FOLDERS = ("mmmu", "MMMU", ".")
_PICTURES = tuple(f"image_{number}" for number in range(1, 8))
_NOT_PUBLISHED = "?"

headline_sums = scoring.mean_sums
headline = statistics.ratio


def load(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read the questions.

    Args:
        data_dir: Folder with ``*validation*.parquet`` (else ``*test*.parquet``), at any depth below
            it or its folder ``mmmu``; or one such file; None: hub mirror of the validation split.
        limit: Number of questions.

    Raises:
        FileNotFoundError: If there is no parquet file.
        MirrorError: If the mirror cannot be loaded.
        ValueError: If a row is malformed.
    """
    if data_dir is None:
        table = MIRRORS[0].open()
        label = "MMMU mirror"
    else:
        table, label = _open_files(data_dir), "MMMU"
    items = [
        _item(row, table, place, f"{label} row {place} ({row.get('id')})")
        for place, row in enumerate(rows_without(table, *_PICTURES))
    ]
    reject_duplicates((item.id for item in items), label)
    return take_sample(items, limit)


def _open_files(data_dir: Path) -> Any:
    import datasets

    files = [data_dir] if data_dir.is_file() else []
    for split in ("validation", "test"):
        for folder in _FOLDERS:
            is_own = folder != "." or "mmmu" in data_dir.resolve().name.lower()
            if not files and is_own:
                files = sorted((data_dir / folder).glob(f"**/*{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"no *validation*.parquet in {data_dir} or its folders mmmu, MMMU")
    return keep_encoded(datasets.Dataset.from_parquet([str(file) for file in files]))


def _item(row: dict[str, Any], table: Any, place: int, where: str) -> Item:
    question = require(row, "question", where)
    options = _read_list(row.get("options"), where)
    is_lettered = require(row, "question_type", where) == "multiple-choice"
    letters = tuple(scoring.LETTERS[: len(options)]) if is_lettered else ()
    lines = [question, *(scoring.lettered(options) if is_lettered else ())]
    lines.append(scoring.LETTER_ANSWER if is_lettered else scoring.SHORT_ANSWER)
    key = str(require(row, "id", where))
    return Item(
        id=key,
        image=picture(table, place, where, lambda full: full["image_1"]),
        prompt="\n".join(lines),
        answers=_read_answers(str(row.get("answer") or _NOT_PUBLISHED), where),
        group=key,
        category=_subject(key),
        options=tuple(options) if is_lettered else (),
        question=question,
        details={"question_type": "lettered" if is_lettered else "open"},
        choices=letters,
    )


def _read_list(text: Any, where: str) -> list[str]:
    """Read a list that the file keeps as text; nothing in it is run."""
    if isinstance(text, list):
        return [str(one) for one in text]
    try:
        value = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: options are not a list: {text!r}") from error
    return [str(one) for one in value]


def _read_answers(text: str, where: str) -> tuple[str, ...]:
    if text == _NOT_PUBLISHED:
        return ()
    return tuple(_read_list(text, where)) if text.startswith("[") else (text,)


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


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over questions, interval, breakdown by subject and by question type."""
    unparsed = sum(row.parsed is None for row in rows)
    return {
        **scoring.summarise_mean(
            rows, METRIC, by_question_type=lambda row: row.details["question_type"]
        ),
        "unparsed_rate": unparsed / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of the best constant answer of each subject, or of a random option."""
    return scoring.best_constant(items, judge)


def write_submission(
    items: Sequence[Item],
    texts: Mapping[str, str | None],
    out_dir: Path,
    data_dir: Path | None = None,
) -> list[Path]:
    """Write the JSON object that the evaluation server takes: id -> letter or text."""
    del data_dir
    said = {
        item.id: parse(item, answer) or ""
        for item in items
        if (answer := texts[item.id]) is not None
    }
    return scoring.write_json(out_dir / "mmmu_submission.json", said)
