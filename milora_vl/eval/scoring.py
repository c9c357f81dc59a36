"""What most benches share: prompt endings, judged rows, mean scores, breakdowns, best guesses."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milora_vl.eval import statistics
from milora_vl.eval.answers import m4c, m4c_accuracy, most_common
from milora_vl.eval.items import Item, Row, split_rows
from milora_vl.files import write_bytes_atomic

Texts = Mapping[str, str | None]
"""Answers by the id of their item; None where the model failed."""
Files = dict[str, Any]
"""Contents of files by name: rows of a ``.jsonl``, text, bytes, or else a JSON value."""

LETTERS = "ABCDEFGHIJ"
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
YES_NO = ("Yes", "No", "yes", "no")
"""Answers of one token to a yes/no question."""


def lettered(options: Sequence[str]) -> list[str]:
    """Return "A. text" lines."""
    return [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]


def is_bare_letter(text: str | None, n_options: int) -> bool:
    """Tell whether an answer is the letter of an option and nothing else, but for a period."""
    said = "" if text is None else text.strip().rstrip(".")
    return len(said) == 1 and said in LETTERS[:n_options]


def judged(
    item: Item,
    text: str | None,
    parsed: str | None,
    score: float,
    well_formed: bool,
    details: Mapping[str, Any] | None = None,
) -> Row:
    """Return the row of an item; ``details`` are added to the item's."""
    return Row(
        id=item.id,
        group=item.group,
        category=item.category,
        answers=item.answers,
        text=text,
        parsed=parsed,
        score=score,
        well_formed=well_formed,
        details={**item.details, **(details or {})},
    )


def parse_m4c(item: Item, text: str) -> str | None:
    """Return the answer to a short question as it is uploaded and scored."""
    return m4c(text)


def judge_m4c(item: Item, text: str | None) -> Row:
    """Score one answer as TextVQA and VizWiz do. ``text`` None is a failed sample, always wrong."""
    if text is None:
        return judged(item, None, None, 0.0, False)
    score = m4c_accuracy(text, item.answers) if item.answers else 0.0
    return judged(item, text, m4c(text), score, bool(text.strip()))


def parse_free(item: Item, text: str) -> str | None:
    """Return an answer as it is, for a judge model to read; None if it is empty."""
    return text.strip() or None


def judge_free(item: Item, text: str | None, details: Mapping[str, Any] | None = None) -> Row:
    """Return the row of a free answer; a judge model's reply replaces its score of 0."""
    said = None if text is None else parse_free(item, text)
    return judged(item, text, said, 0.0, bool(said), details)


def no_majority(items: Sequence[Item]) -> None:
    """Return None: there is no constant answer to compare free text with."""


def mean_sums(rows: Sequence[Row]) -> statistics.Array:
    """Return [groups, 2]: credit and number of questions."""
    return statistics.sum_by_group([[row.score, 1.0] for row in rows], [row.group for row in rows])


def mean_score(rows: Sequence[Row]) -> dict[str, Any]:
    """Return mean score, its interval over groups, and n; None without rows."""
    if not rows:
        return {"score": None, "interval_95": None, "n": 0}
    interval = statistics.bootstrap_interval(mean_sums(rows), statistics.ratio)
    score = float(np.mean([row.score for row in rows]))
    return {"score": score, "interval_95": list(interval), "n": len(rows)}


def break_down(rows: Sequence[Row], label: Callable[[Row], str]) -> dict[str, float]:
    """Return the mean score of the rows of each label."""
    parts = split_rows(rows, [label(row) for row in rows])
    return {name: float(np.mean([row.score for row in part])) for name, part in parts.items()}


def summarize_mean(
    rows: Sequence[Row], metric: str, **breakdowns: Callable[[Row], str]
) -> dict[str, Any]:
    """Return mean score, interval, the breakdown by category, and further ones by name."""
    parts = split_rows(rows, [row.category for row in rows])
    by_category = {name: mean_score(part) for name, part in parts.items()}
    return {
        "metric": metric,
        **mean_score(rows),
        "by_category": {name: part["score"] for name, part in by_category.items()},
        "by_category_details": by_category,
        **{name: break_down(rows, label) for name, label in breakdowns.items()},
    }


def letter_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Return the accuracy of the lenient reading, and how often no letter was read at all."""
    return {
        "lenient_accuracy": sum(row.details["lenient"] in row.answers for row in rows) / len(rows),
        "unparsed_rate": sum(row.parsed is None for row in rows) / len(rows),
    }


def best_constant(
    items: Sequence[Item],
    judge: Callable[[Item, str], Row],
    label: Callable[[Item], str] = lambda item: item.category,
) -> float:
    """Return the mean score of giving each label's most frequent answer, whatever is asked.

    For lettered questions guessing at random counts too, where it is better.
    """
    parts: dict[str, list[Item]] = {}
    for item in items:
        parts.setdefault(label(item), []).append(item)
    total = 0.0
    for part in parts.values():
        # the most frequent answer of a question, then the most frequent of these
        guess = most_common([most_common(item.answers) for item in part])
        credit = sum(judge(item, guess).score for item in part)
        # guessing at random needs no image either
        chance = sum(1 / len(item.options) for item in part if item.options)
        total += max(credit, chance)
    return total / len(items)


def answered(items: Sequence[Item], texts: Texts) -> list[tuple[Item, str]]:
    """Return the items that were answered, each with its text; a failed sample has none."""
    return [(item, text) for item in items if (text := texts[item.id]) is not None]


def one_file(name: str, entry: Callable[[Item, str], Any]) -> Callable[..., Files]:
    """Return a bench's ``submission`` of one file with one entry for each answered question."""

    def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
        return {name: [entry(*pair) for pair in answered(items, texts)]}

    return submission


def write_submission(files: Files, folder: Path) -> list[Path]:
    """Write the files of a submission. Returns their paths."""
    for name, content in files.items():
        if name.endswith(".jsonl"):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        elif not isinstance(content, (str, bytes)):
            content = json.dumps(content, ensure_ascii=False) + "\n"
        data = content.encode() if isinstance(content, str) else content
        write_bytes_atomic(folder / name, data)
    return [folder / name for name in files]
