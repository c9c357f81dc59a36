"""What changed between two evaluations of the same questions, paired question by question."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora_vl.eval import statistics
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.items import Row, read_json_lines, read_json_object


def read_rows(folder: Path | str) -> dict[str, list[Row]]:
    """Read the judged answers of an evaluation folder, by bench.

    Raises:
        FileNotFoundError: If ``predictions.jsonl`` is not there.
        ValueError: If a line is malformed; names the line.
    """
    path = Path(folder) / "predictions.jsonl"
    names = [one.name for one in dataclasses.fields(Row)]
    rows: dict[str, list[Row]] = {}
    for number, line in enumerate(read_json_lines(path), start=1):
        missing = {"bench", *names} - set(line)
        if missing:
            raise ValueError(f"{path} line {number}: no key {', '.join(sorted(missing))}")
        values = {name: line[name] for name in names}
        values["answers"] = tuple(line["answers"])
        rows.setdefault(line["bench"], []).append(Row(**values))
    return rows


def compare_folders(before: Path | str, after: Path | str) -> dict[str, dict[str, Any]]:
    """Compare two evaluations of the same questions, paired question by question.

    Args:
        before: Evaluation folder (``results.json``, ``predictions.jsonl``).
        after: Another.

    Returns:
        For each bench that both hold: difference of the scores, its 95 % interval, and how many
        answers turned right or wrong.

    Raises:
        ValueError: If a bench was asked different questions, or scored by different versions.
        FileNotFoundError: If a file is missing.
    """
    folders = (before, after)
    results = [read_json_object(Path(folder) / "results.json")["benches"] for folder in folders]
    all_rows = [read_rows(folder) for folder in folders]
    changes = {}
    for name in results[1]:
        if name not in results[0] or results[1][name]["score"] is None:
            continue
        old, new = (one[name]["version"] for one in results)
        if old != new:
            raise ValueError(f"{name}: scored by version {old} and {new}; evaluate both again")
        judges = [judge_of(one[name]) for one in results]
        if judges[0] != judges[1]:
            raise ValueError(f"{name}: judged by {judges[0]} and {judges[1]}; judge both alike")
        changes[name] = _paired_change(name, all_rows[0][name], all_rows[1][name])
    return changes


def judge_of(entry: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return name of the judge and of its prompt; scores of different ones cannot be compared."""
    return entry.get("judge"), entry.get("judge_prompt")


def _paired_change(name: str, before: list[Row], after: list[Row]) -> dict[str, Any]:
    bench = BENCHES[name]
    before, after = (sorted(rows, key=lambda row: row.id) for rows in (before, after))
    if [row.id for row in before] != [row.id for row in after]:
        raise ValueError(f"{name}: the two evaluations asked different questions")
    sums = bench.headline_sums(before), bench.headline_sums(after)
    scores = [float(bench.headline(one.sum(axis=0, keepdims=True))[0]) for one in sums]
    pairs = list(zip(before, after, strict=True))
    return {
        "difference": scores[1] - scores[0],
        "interval_95": list(statistics.difference_interval(*sums, bench.headline)),
        "n_better": sum(new.score > old.score for old, new in pairs),
        "n_worse": sum(new.score < old.score for old, new in pairs),
        "n_rows": len(pairs),
    }


def read_comparison(run_folder: Path | str) -> dict[str, Any] | None:
    """Return before, after and changes of a run folder; None if it holds no two evaluations."""
    folders = [Path(run_folder) / name for name in ("eval_before", "eval_after")]
    if not all((folder / "results.json").is_file() for folder in folders):
        return None
    before, after = (read_json_object(folder / "results.json") for folder in folders)
    return {"before": before, "after": after, "changes": compare_folders(*folders)}
