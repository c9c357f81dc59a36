"""Several runs side by side: a terminal table and one HTML page."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from milora_vl.eval import run_plots
from milora_vl.eval.forgetting import forgetting_text
from milora_vl.eval.html_parts import figure, page, read_items, thumbnail
from milora_vl.eval.items import read_json_lines
from milora_vl.eval.runs import Run, bench_order, compare_pair, disagreements, read_runs
from milora_vl.eval.tables import bench_title, metric_text, scale_of, with_interval
from milora_vl.files import write_text_atomic

_PICTURES_A_BENCH = 8


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
    console = console or Console()
    console.print(runs_table(runs, changes))
    for run in runs:
        if found := forgetting_text(run.forgetting()):
            console.print(f"{run.name}: {', '.join(map(' '.join, found.items()))}", markup=False)
    write_text_atomic(out, render_comparison(runs, changes))
    return changes


def runs_table(
    runs: Sequence[Run], changes: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Table:
    """Build the terminal table: a row a bench and run."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("bench")
    table.add_column("run", overflow="fold")
    for heading in ("score (95 %)", "against the first", "p", "n"):
        table.add_column(heading, justify="right")
    for bench, of_runs in changes.items():
        for place, run in enumerate(runs):
            entry = run.results["benches"].get(bench)
            if entry is None:
                continue
            title = escape(_title(bench, run, entry))
            change, p_value = _change_cells(of_runs.get(run.name), scale_of(entry))
            score = with_interval(entry["score"], entry["interval_95"], scale_of(entry))
            shown = title if place == 0 else ""
            table.add_row(shown, escape(run.name), score, change, p_value, str(entry["n"]))
        table.add_section()
    return table


def _title(bench: str, run: Run, entry: Mapping[str, Any]) -> str:
    return f"{bench_title(bench, run.results)}, {metric_text(entry)}"


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


def render_comparison(
    runs: Sequence[Run], changes: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> str:
    """Build the HTML page; parts that no run has are left out."""
    names = [run.name for run in runs]
    parts = [f"<h1>{html.escape(' · '.join(names))}</h1>", "<h2>Scores</h2>"]
    parts.append(
        "<p>Per cent (MME: points) with 95 % intervals. Differences are to the first run, paired"
        " question by question: bootstrap over questions or pictures, and McNemar's exact test"
        " where an answer is right or wrong. McNemar takes questions as independent, the bootstrap"
        " does not. No p-value is corrected for the number of comparisons.</p>"
    )
    parts.append(_scores(runs, changes))
    entries = {bench: [run.results["benches"].get(bench) for run in runs] for bench in changes}
    parts.append(figure(run_plots.plot_run_scores(names, entries), "scores with intervals"))
    curves = run_plots.plot_run_curves({run.name: run.metrics for run in runs})
    if curves:
        parts += ["<h2>Training</h2>", figure(curves, "losses over optimiser steps")]
    parts += _facts("Throughput and memory", {run.name: run.facts() for run in runs})
    parts += _facts("Forgetting", {run.name: forgetting_text(run.forgetting()) for run in runs})
    for run in runs:
        if run.certificate is not None:
            summary = html.escape(run.certificate.summary())
            parts.append(f"<h2>Init certificate: {html.escape(run.name)}</h2><pre>{summary}</pre>")
    for bench in changes:
        parts += _gallery(runs, bench)
    return page(f"{len(runs)} runs", parts)


def _scores(runs: Sequence[Run], changes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = []
    for bench, of_runs in changes.items():
        for run in runs:
            entry = run.results["benches"].get(bench)
            if entry is None:
                continue
            change, p_value = _change_cells(of_runs.get(run.name), scale_of(entry))
            cells = [
                html.escape(_title(bench, run, entry)),
                html.escape(run.name),
                f"<b>{with_interval(entry['score'], entry['interval_95'], scale_of(entry))}</b>",
                html.escape(change),
                html.escape(p_value),
                str(entry["n"]),
                f"{entry['seconds_per_item']:.3f}",
            ]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("", "run", "score", "against the first", "p", "n", "s/item")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _facts(title: str, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table of numbers, a row a name and a column a run; nothing if there is none."""
    names = list(dict.fromkeys(name for values in facts.values() for name in values))
    if not names:
        return []
    rows = []
    for name in names:
        values = [_number(values.get(name)) for values in facts.values()]
        cells = "".join(f"<td>{value}</td>" for value in (html.escape(name), *values))
        rows.append(f"<tr>{cells}</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("", *facts))
    return [f"<h2>{title}</h2><table><tr>{head}</tr>{''.join(rows)}</table>"]


def _number(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return "–" if value is None else html.escape(str(value))


def _gallery(runs: Sequence[Run], bench: str) -> list[str]:
    """Show questions that some runs answer right and others wrong."""
    chosen = disagreements(runs, bench, _PICTURES_A_BENCH)
    if not chosen:
        return []
    lines = {run.name: _lines(run, bench) for run in runs}
    data = next((run.results.get("data") for run in runs if run.rows.get(bench)), None)
    items = read_items(bench, Path(data)) if data else {}
    cards = []
    for key in chosen:
        known = [(name, one[key]) for name, one in lines.items() if key in one]
        first = known[0][1]
        options = "".join(
            f"\n{letter}. {text}"
            for letter, text in zip("ABCDEFGHIJ", first["options"], strict=False)
        )
        said = "".join(
            f'<p class="{"right" if line["score"] >= 0.5 else "wrong"}">'
            f"{html.escape(name)}: {html.escape(line['text'] or repr(line['text']))}</p>"
            for name, line in known
        )
        picture = thumbnail(items[key]) if key in items else ""
        right = html.escape(first["answers"][0]) if first["answers"] else "–"
        cards.append(
            f'<div class="card">{picture}<p>{html.escape(first["question"] + options)}</p>'
            f"<p><b>right: {right}</b></p>{said}</div>"
        )
    title = html.escape(bench_title(bench, runs[0].results))
    return [f'<h2>Where the runs disagree: {title}</h2><div class="cards">{"".join(cards)}</div>']


def _lines(run: Run, bench: str) -> dict[str, dict[str, Any]]:
    rows = read_json_lines(run.eval_folder / "predictions.jsonl")
    return {row["id"]: row for row in rows if row["bench"] == bench}
