"""What changed between evaluations of the same questions, paired question by question.

``compare_folders`` compares two evaluations, and refuses those that cannot be compared.
``compare_runs`` sets several runs beside the first: it prints a table and writes an HTML page, and
where two cannot be compared the page says why.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors import safe_open

from milora_vl.adapter.certificate import Certificate
from milora_vl.eval import pages, plots, statistics
from milora_vl.eval.bench_files import printable, read_json_lines, read_json_object
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.forgetting import compare_text_loss, forgetting_text
from milora_vl.eval.items import Row
from milora_vl.eval.pages import parts_or_reason
from milora_vl.files import write_text_atomic


def read_rows(folder: Path | str) -> dict[str, list[Row]]:
    """Read the scored answers of an evaluation folder, by bench; those without a label are skipped.

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
        if line["score"] is None:
            continue  # without a label there is nothing to compare
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
        ``compare_pair`` of each bench that both have scored answers of.

    Raises:
        ValueError: If a bench was asked different questions, or scored by different versions.
        FileNotFoundError: If a file is missing.
    """
    runs = [_read_evaluation(Path(folder), str(folder)) for folder in (before, after)]
    changes = {}
    for bench in bench_order(runs[1:]):
        if all(bench in run.rows for run in runs):
            changes[bench] = compare_pair(runs[0], runs[1], bench)
            if "why_not" in changes[bench]:
                raise ValueError(f"{bench}: {changes[bench]['why_not']}; evaluate both again")
    return changes


def read_comparison(run_folder: Path | str) -> dict[str, Any] | None:
    """Return before, after and changes of a run folder; None if it holds no two evaluations."""
    folders = [Path(run_folder) / name for name in ("eval_before", "eval_after")]
    if not all((folder / "results.json").is_file() for folder in folders):
        return None
    before, after = (read_json_object(folder / "results.json") for folder in folders)
    return {"before": before, "after": after, "changes": compare_folders(*folders)}


Changes = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Bench -> name of a run -> ``compare_pair`` of the first run and it."""

_IMAGES_A_BENCH = 8
_FACTS = "Throughput, memory and size of the update"
_HEADS = ("bench", "run", "score (95 %)", "against the first", "p", "n", "s/item")
_SPEED = ("train_samples_per_second", "train_tokens_per_second", "train_runtime")
_MEMORY = ("peak_memory_gib", "peak_cuda_memory_gib")


@dataclass(frozen=True)
class Run:
    """One run, or one evaluation alone.

    Attributes:
        name: Unique among the runs compared.
        eval_folder: Where its ``results.json`` and ``predictions.jsonl`` are.
        results: Content of ``results.json``.
        rows: Judged answers by bench.
        metrics: Lines of ``metrics.jsonl``; empty without a training log.
        certificate: The init certificate, or None.
        before: Content of ``eval_before/results.json`` of the same run, or None.
    """

    name: str
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
        adapter = self.eval_folder.parent / "adapter"
        norm = update_norm(adapter) if self.eval_folder.name == "eval_after" else None
        if norm is not None:
            facts["update_norm"] = norm
        return facts

    def forgetting(self) -> dict[str, Any]:
        """Return the loss on fixed texts, and against the base model if it was measured too."""
        probe = self.results.get("text_probe")
        if not probe:
            return {}
        base = (self.before or {}).get("text_probe")
        change = compare_text_loss(base, probe) if base else None
        return change or {"text_loss_after_nats_per_token": probe["loss_nats_per_token"]}


def update_norm(adapter: Path) -> float | None:
    """Return the Frobenius norm of what an adapter adds to all weights; None where unknown.

    That is the root of the sum of ||scaling B A||^2 over the layers, which needs only the small
    products B^T B and A A^T. DoRA also rescales the weights, so its update is not this product.
    """
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if not (weights.is_file() and settings.is_file()):
        return None
    config = read_json_object(settings)
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        return None
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    total = 0.0
    with safe_open(weights, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a mapping
            if ".lora_A." in name:
                down = tensors.get_tensor(name).float()  # [r, d_in]
                up = tensors.get_tensor(name.replace(".lora_A.", ".lora_B.")).float()
                # ||B A||^2 = sum((B^T B) * (A A^T)): products of [r, r] instead of [d_out, d_in]
                total += float(((up.T @ up) * (down @ down.T)).sum())
    return scaling * math.sqrt(max(total, 0.0))


def verdict(bench: str, first: str, name: str, change: Mapping[str, Any]) -> str:
    """Say in a sentence whether two runs differ on a bench; "not" is an answer like any other."""
    if "why_not" in change:
        return f"{bench}: {first} and {name} cannot be compared: {change['why_not']}."
    low, high = change["interval_95"]
    if low <= 0 <= high:
        return (
            f"{bench}: {first} and {name} are not distinguishable on these questions: the 95 % "
            "interval of their difference contains 0."
        )
    better, worse = (name, first) if low > 0 else (first, name)
    return (
        f"{bench}: {better} is better than {worse}: the 95 % interval of their difference does "
        "not contain 0."
    )


def verdicts(runs: Sequence[Run], changes: Changes) -> list[str]:
    """Return the sentence of ``verdict`` for every bench and every run but the first."""
    return [
        verdict(pages.bench_title(bench, runs[0].results), runs[0].name, name, change)
        for bench, of_runs in changes.items()
        for name, change in of_runs.items()
    ]


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
    return replace(
        _read_evaluation(place, name),
        metrics=read_json_lines(metrics) if metrics.is_file() else [],
        certificate=None if text is None else Certificate.from_json(text),
        before=read_json_object(before) if is_after else None,
    )


def _read_evaluation(folder: Path, name: str) -> Run:
    return Run(name, folder, read_json_object(folder / "results.json"), read_rows(folder))


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
    old, new = (entry["version"] for entry in entries)
    if old != new:
        return {"why_not": f"scored by version {old} and {new}"}
    # scores of different judges, or of different wordings, cannot be compared
    judges = [(entry.get("judge"), entry.get("judge_prompt")) for entry in entries]
    if judges[0] != judges[1]:
        return {"why_not": f"scored by different judges or prompts, {judges[0]} and {judges[1]}"}
    pair = [sorted(run.rows.get(bench, []), key=lambda row: row.id) for run in (first, second)]
    if not pair[0] or [row.id for row in pair[0]] != [row.id for row in pair[1]]:
        return {"why_not": "the two were asked different questions, or answers were not kept"}
    headline = BENCHES[bench].headline
    sums = [BENCHES[bench].headline_sums(rows) for rows in pair]
    low, high, p_value = statistics.paired_bootstrap(*sums, headline)
    before, after = (statistics.total(one, headline) for one in sums)
    result = {"difference": after - before, "interval_95": [low, high], "p_bootstrap": p_value}
    return result | _count_changes(entries[0], sums, pair)


def _count_changes(
    entry: Mapping[str, Any], sums: Sequence[statistics.Array], pair: Sequence[Sequence[Row]]
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
    # logarithms, since binomial coefficients of thousands overflow
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
    tables = [
        {row.id: pages.is_right(row.score) for row in run.rows.get(bench, [])} for run in runs
    ]
    tables = [table for table in tables if table]
    if len(tables) < 2:
        return []
    differing = [
        key
        for key in tables[0]
        if all(key in table for table in tables) and len({table[key] for table in tables}) > 1
    ]
    # spread over the file, so that not all are of one category
    step = max(1, len(differing) // n)
    return differing[::step][:n]


def compare_runs(
    folders: Sequence[Path], out: Path, console: Console | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare runs with the first one: print a table, write an HTML page.

    Args:
        folders: Run folders or evaluation folders, two or more.
        out: The HTML file.
        console: Where the table goes; None: standard output.

    Returns:
        Bench -> name of a run -> ``compare_pair`` of the first run and it.

    Raises:
        ValueError: If fewer than two are given, or a file is damaged.
        FileNotFoundError: If a folder holds no evaluation.
    """
    if len(folders) < 2:
        raise ValueError("name two runs or more")
    runs = read_runs(folders)
    changes = {
        bench: {run.name: compare_pair(runs[0], run, bench) for run in runs[1:]}
        for bench in bench_order(runs)
    }
    write_text_atomic(out, render_comparison(runs, changes))
    console = console or Console()
    console.print(pages.score_table(_HEADS, runs_rows(runs, changes)))
    lines = verdicts(runs, changes)
    for run in runs:
        if found := forgetting_text(run.forgetting()):
            lines.append(f"{run.name}: {', '.join(map(' '.join, found.items()))}")
    for line in lines:
        console.print(printable(line), markup=False)
    return changes


def runs_rows(runs: Sequence[Run], changes: Changes) -> list[tuple[str, ...]]:
    """Return the rows of the table: one for each bench and run."""
    rows = []
    for bench, of_runs in changes.items():
        for run in runs:
            entry = run.results["benches"].get(bench)
            if entry is not None:
                scale = pages.scale_of(entry)
                rows.append(
                    (
                        pages.bench_title(bench, run.results, entry),
                        run.name,
                        pages.with_interval(entry["score"], entry["interval_95"], scale),
                        *_change_cells(of_runs.get(run.name), scale),
                        str(entry["n"]),
                        f"{entry['seconds_per_item']:.3f}",
                    )
                )
    return rows


def _change_cells(change: Mapping[str, Any] | None, scale: float) -> tuple[str, str]:
    """Return the difference with its interval, and the p-values; empty for the first run."""
    if change is None:
        return "", ""
    if "why_not" in change:
        return change["why_not"], ""
    low, high = change["interval_95"]
    text = f"{scale * change['difference']:+.1f} ({scale * low:+.1f} to {scale * high:+.1f})"
    p_value = f"bootstrap {change['p_bootstrap']:.3g}"
    if "p_mcnemar" in change:
        p_value += f", McNemar {change['p_mcnemar']:.3g}"
    return text, p_value


def render_comparison(runs: Sequence[Run], changes: Changes) -> str:
    """Build the HTML page; parts that no run has are skipped."""
    parts = [f"<h1>{html.escape(' · '.join(run.name for run in runs))}</h1>", "<h2>Scores</h2>"]
    parts.append(
        "<p>Per cent (MME: points) with 95 % intervals. Differences are to the first run, paired"
        " question by question: bootstrap over questions or images, and McNemar's exact test"
        " where an answer is right or wrong. McNemar takes questions as independent, the bootstrap"
        " does not. No p-value is corrected for the number of comparisons.</p>"
    )
    parts += [f"<p><b>{html.escape(text)}</b></p>" for text in verdicts(runs, changes)]
    sections: list[tuple[str, Callable[[], list[str]]]] = [
        ("Scores", lambda: [pages.html_table(_HEADS, runs_rows(runs, changes))]),
        ("The figure of scores", lambda: _score_figure(runs, list(changes))),
        ("Training", lambda: pages.training_part({run.name: run.metrics for run in runs})),
        (
            _FACTS,
            lambda: _facts(_FACTS, {run.name: run.facts() for run in runs}),
        ),
        (
            "Forgetting",
            lambda: _facts(
                "Forgetting", {run.name: forgetting_text(run.forgetting()) for run in runs}
            ),
        ),
    ]
    for run in runs:
        if run.certificate is not None:
            title = f"Init certificate: {run.name}"
            sections.append((title, partial(pages.certificate_part, run.certificate, title)))
    for bench in changes:
        sections.append((f"Disagreements on {bench}", partial(_gallery, runs, bench)))
    for title, build in sections:
        parts += parts_or_reason(title, build)
    return pages.page(f"{len(runs)} runs", parts)


def _score_figure(runs: Sequence[Run], benches: Sequence[str]) -> list[str]:
    entries = {bench: [run.results["benches"].get(bench) for run in runs] for bench in benches}
    scored = {
        bench: results
        for bench, results in entries.items()
        if any(entry and entry["score"] is not None for entry in results)
    }
    if not scored:
        return []
    return [
        pages.figure(plots.plot_scores([run.name for run in runs], scored), "scores with intervals")
    ]


def _facts(title: str, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table of numbers, a row a name and a column a run; nothing if there is none."""
    names = list(dict.fromkeys(name for values in facts.values() for name in values))
    if not names:
        return []
    rows = [[name, *(_number(values.get(name)) for values in facts.values())] for name in names]
    return [f"<h2>{title}</h2>", pages.html_table(("", *facts), rows)]


def _number(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return "–" if value is None else str(value)


def _gallery(runs: Sequence[Run], bench: str) -> list[str]:
    """Show questions that some runs answer right and others wrong."""
    chosen = disagreements(runs, bench, _IMAGES_A_BENCH)
    if not chosen:
        return []
    lines = {
        run.name: {
            row["id"]: row
            for row in read_json_lines(run.eval_folder / "predictions.jsonl")
            if row["bench"] == bench
        }
        for run in runs
    }
    data = next((run.results.get("data") for run in runs if run.rows.get(bench)), None)
    items = pages.read_items(bench, Path(data)) if data else {}
    cards = []
    for key in chosen:
        said = [(name, one[key]) for name, one in lines.items() if key in one]
        cards.append(pages.card(said[0][1], said, items.get(key)))
    title = html.escape(pages.bench_title(bench, runs[0].results))
    return [f'<h2>Where the runs disagree: {title}</h2><div class="cards">{"".join(cards)}</div>']
