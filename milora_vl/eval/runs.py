"""Runs to compare: what a run or evaluation folder holds, and paired tests between two."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from milora_vl.adapter.certificate import Certificate
from milora_vl.eval import statistics
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.comparison import judge_of, read_rows
from milora_vl.eval.forgetting import compare_text_loss
from milora_vl.eval.items import Row, read_json_lines, read_json_object

_SPEED = ("train_samples_per_second", "train_tokens_per_second", "train_runtime")
_MEMORY = ("peak_memory_gib", "peak_cuda_memory_gib")


@dataclass(frozen=True)
class Run:
    """One run, or one evaluation alone.

    Attributes:
        name: Unique among the runs compared.
        folder: The folder named by the user.
        eval_folder: Where its ``results.json`` and ``predictions.jsonl`` are.
        results: Content of ``results.json``.
        rows: Judged answers by bench.
        metrics: Lines of ``metrics.jsonl``; empty without a training log.
        certificate: The init certificate, or None.
        before: Content of ``eval_before/results.json`` of the same run, or None.
    """

    name: str
    folder: Path
    eval_folder: Path
    results: dict[str, Any]
    rows: dict[str, list[Row]]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    certificate: Certificate | None = None
    before: dict[str, Any] | None = None

    def facts(self) -> dict[str, float]:
        """Return throughput and memory, as far as the run recorded them; units in the keys."""
        facts: dict[str, float] = {}
        for entry in self.metrics:
            facts |= {key: entry[key] for key in (*_SPEED, *_MEMORY) if entry.get(key) is not None}
        if self.certificate is not None:
            facts["trainable_parameters"] = self.certificate.trainable_parameters
            facts["init_seconds"] = self.certificate.seconds
            facts["init_peak_memory_gib"] = self.certificate.peak_memory_gib
        return facts

    def forgetting(self) -> dict[str, Any]:
        """Return the loss on fixed texts, and against the base model if it was measured too."""
        probe = self.results.get("text_probe")
        if not probe:
            return {}
        base = (self.before or {}).get("text_probe")
        change = compare_text_loss(base, probe) if base else None
        return change or {"text_loss_after_nats_per_token": probe["loss_nats_per_token"]}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders (``eval_after/``, else ``eval_before/``) or evaluation folders.

    Raises:
        FileNotFoundError: If a folder holds no evaluation; says what was looked for.
        ValueError: If a file is damaged.
    """
    return [
        _read(Path(folder), name) for folder, name in zip(folders, _names(folders), strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest tails of the paths that tell them apart; repeats get a number."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{one[-1]} ({place})" for place, one in enumerate(parts, start=1)]


def _read(folder: Path, name: str) -> Run:
    choices = [folder / "eval_after", folder / "eval_before", folder]
    place = next((one for one in choices if _is_evaluation(one)), None)
    if place is None:
        raise FileNotFoundError(
            f"{folder}: no results.json of an evaluation there or in its eval_after/; run "
            "milora-vl train or python -m milora_vl.eval --out first"
        )
    root = folder.parent if folder.name in ("eval_after", "eval_before") else folder
    metrics, certificate = root / "metrics.jsonl", root / "certificate.json"
    before = root / "eval_before/results.json"
    is_after = place.name == "eval_after" and before.is_file()
    text = certificate.read_text(encoding="utf-8") if certificate.is_file() else None
    return Run(
        name=name,
        folder=folder,
        eval_folder=place,
        results=read_json_object(place / "results.json"),
        rows=read_rows(place),
        metrics=read_json_lines(metrics) if metrics.is_file() else [],
        certificate=None if text is None else Certificate.from_json(text),
        before=read_json_object(before) if is_after else None,
    )


def _is_evaluation(folder: Path) -> bool:
    file = folder / "results.json"
    return file.is_file() and "benches" in read_json_object(file)


def bench_order(runs: Sequence[Run]) -> list[str]:
    """Return the benches that any run holds, in the order of first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.results["benches"]))


def compare_pair(first: Run, second: Run, bench: str) -> dict[str, Any]:
    """Compare two runs on one bench, question by question.

    Returns:
        ``difference`` of the scores (second minus first), ``interval_95`` and ``p_bootstrap`` of
        the paired bootstrap over groups, ``n_better`` and ``n_worse`` units (questions; MMBench:
        with all their rotations) and ``p_mcnemar`` where units are right or wrong; or ``why_not``.
    """
    entries = [run.results["benches"].get(bench) for run in (first, second)]
    if any(entry is None or entry["score"] is None for entry in entries):
        return {"why_not": "no score in both"}
    if entries[0]["version"] != entries[1]["version"]:
        return {"why_not": "scored by different versions"}
    if judge_of(entries[0]) != judge_of(entries[1]):
        return {"why_not": "scored by different judges or with different prompts"}
    pair = [sorted(run.rows.get(bench, []), key=lambda row: row.id) for run in (first, second)]
    if not pair[0] or [row.id for row in pair[0]] != [row.id for row in pair[1]]:
        return {"why_not": "different questions, or no answers kept"}
    module = BENCHES[bench]
    sums = [module.headline_sums(rows) for rows in pair]
    scores = [float(module.headline(one.sum(axis=0, keepdims=True))[0]) for one in sums]
    low, high, p_value = statistics.paired_bootstrap(*sums, module.headline)
    result = {
        "difference": scores[1] - scores[0],
        "interval_95": [low, high],
        "p_bootstrap": p_value,
    }
    return result | _count_changes(bench, entries[0], sums, pair)


def _count_changes(
    bench: str, entry: Mapping[str, Any], sums: Sequence[Any], pair: Sequence[Sequence[Row]]
) -> dict[str, Any]:
    if entry["metric"] == "circular_accuracy":  # the rotations of a question stand or fall together
        units = [one[:, 0] for one in sums]
    else:
        units = [np.array([row.score for row in rows]) for rows in pair]
    n_better, n_worse = int((units[1] > units[0]).sum()), int((units[1] < units[0]).sum())
    changes: dict[str, Any] = {"n_better": n_better, "n_worse": n_worse, "n_units": len(units[0])}
    if all(set(np.unique(one)) <= {0.0, 1.0} for one in units):
        changes["p_mcnemar"] = mcnemar(n_better, n_worse)
    return changes


def mcnemar(n_better: int, n_worse: int) -> float:
    """Return the two-sided exact McNemar p-value of two counts of discordant pairs.

    If neither run is better, each discordant pair goes either way like a fair coin.
    """
    n = n_better + n_worse
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(min(n_better, n_worse) + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def disagreements(runs: Sequence[Run], bench: str, n: int) -> list[str]:
    """Return ids of questions that some runs answer right and others wrong, spread over the bench.

    Args:
        runs: Two or more.
        bench: Name of the bench.
        n: Most ids returned.
    """
    tables = [{row.id: row.score >= 0.5 for row in run.rows.get(bench, [])} for run in runs]
    tables = [table for table in tables if table]
    if len(tables) < 2:
        return []
    differing = [
        key
        for key in tables[0]
        if all(key in table for table in tables) and len({table[key] for table in tables}) > 1
    ]
    step = max(1, len(differing) // n)
    return differing[::step][:n]
