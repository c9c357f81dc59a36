"""Your own questions: a JSONL file of ``question``, ``image`` and ``choices`` or ``answers``.

A line with ``choices`` is lettered and has ``answer``, a letter or the text of a choice; one with
``answers`` is free and right if it equals one of them once both are normalised. With neither there
is no score. Optional: ``id``, ``category``, ``prompt`` (the whole prompt, used as it is).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import m4c, parse_option, vqa_official
from milora_vl.eval.bench_files import locate, picture_file
from milora_vl.eval.items import (
    Item,
    Row,
    read_json_lines,
    reject_duplicates,
    require,
    take_sample,
)

VERSION = 1
METRIC = "accuracy"
MAX_NEW_TOKENS = 32

headline_sums = scoring.mean_sums
headline = statistics.ratio


def load(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read the questions.

    Args:
        data_dir: The JSONL file, or a folder with ``custom.jsonl``; pictures are named relative to
            the file.
        limit: Number of questions.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: Naming the line, if it is malformed.
    """
    if data_dir is None:
        raise FileNotFoundError("the bench 'custom' has no mirror: name its JSONL file with --data")
    path = locate(data_dir, ("custom",), ("*custom.jsonl",), "questions of your own")
    rows = enumerate(read_json_lines(path), start=1)
    items = [_item(row, path, number) for number, row in rows]
    reject_duplicates((item.id for item in items), str(path))
    return take_sample(items, limit)


def _item(row: dict[str, Any], path: Path, number: int) -> Item:
    where = f"{path.name} row {number}"
    question = str(require(row, "question", where))
    choices = tuple(str(one) for one in row.get("choices") or ())
    if choices and row.get("answers"):
        raise ValueError(f"{path} row {number}: choices and answers; give one of the two")
    if len(choices) > len(scoring.LETTERS) or len(choices) == 1:
        raise ValueError(f"{path} row {number}: {len(choices)} choices, 2 to 10 are possible")
    letters = tuple(scoring.LETTERS[: len(choices)])
    ending = scoring.LETTER_ANSWER if choices else scoring.SHORT_ANSWER
    prompt = "\n".join([question, *scoring.lettered(choices), ending])
    image = row.get("image")
    answers = tuple(str(one) for one in row.get("answers") or ())
    if choices and row.get("answer") is not None:
        answers = (_letter(str(row["answer"]), choices, f"{path} row {number}"),)
    return Item(
        id=str(row.get("id", number)),
        image=picture_file(path, ("images",), where, str(image)) if image else None,
        prompt=str(row.get("prompt", prompt)),
        answers=answers,
        group=str(image or row.get("id", number)),
        category=str(row.get("category", "all")),
        options=choices,
        question=question,
        choices=letters,
    )


def _letter(answer: str, choices: Sequence[str], where: str) -> str:
    if answer in choices:
        return scoring.LETTERS[choices.index(answer)]
    if len(answer) == 1 and answer in scoring.LETTERS[: len(choices)]:
        return answer
    raise ValueError(f"{where}: answer {answer!r} is neither a letter nor one of the choices")


def parse(item: Item, text: str) -> str | None:
    """Return the letter, or the answer as it is compared."""
    return parse_option(text, item.options) if item.options else vqa_official(m4c(text))


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 if right. ``text`` None is a failed sample, always wrong."""
    said = None if text is None else parse(item, text)
    if item.options:
        is_formed = scoring.is_bare_letter(text, len(item.options))
        return scoring.judged(item, text, said, float(said in item.answers), is_formed)
    right = {vqa_official(m4c(answer)) for answer in item.answers}
    return scoring.judged(item, text, said, float(said in right), bool(said))


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy, interval and breakdown by ``category``."""
    return scoring.summarise_mean(rows, METRIC)


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of the best constant answer of each category, or of a random choice."""
    return scoring.best_constant(items, judge)


def write_submission(
    items: Sequence[Item],
    texts: Mapping[str, str | None],
    out_dir: Path,
    data_dir: Path | None = None,
) -> list[Path]:
    """Write the answers as JSON lines: id, text and what was read out of it."""
    del data_dir
    rows = [
        {"id": item.id, "text": answer, "parsed": parse(item, answer)}
        for item in items
        if (answer := texts[item.id]) is not None
    ]
    return scoring.write_json_lines(out_dir / "custom_answers.jsonl", rows)
