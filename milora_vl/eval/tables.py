"""Scores as text: terminal tables of one evaluation, and of two side by side."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


def as_percent(value: float | None) -> str:
    """Write a fraction as per cent with one decimal; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def with_interval(value: float | None, interval: list[float] | None) -> str:
    """Write "61.0 (58.2 to 64.1)"."""
    if value is None or interval is None:
        return as_percent(value)
    return f"{as_percent(value)} ({as_percent(interval[0])} to {as_percent(interval[1])})"


def bench_title(name: str, results: Mapping[str, Any]) -> str:
    """Name a bench; questions of another data set in its format are not called by its name."""
    data_set = results.get("data_set")
    return f"{data_set} ({name} format)" if data_set else name


def results_table(results: Mapping[str, Any]) -> Table:
    """Build the table of one evaluation, scores in per cent."""
    table = Table(box=box.SIMPLE_HEAD, title=escape(_title(results)), title_justify="left")
    table.add_column("bench")
    for heading in ("score (95 %)", "no picture", "majority", "n", "s/item"):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for name, bench in results["benches"].items():
        table.add_row(
            f"{escape(bench_title(name, results))}\n{bench['metric']}",
            with_interval(bench["score"], bench["interval_95"]),
            with_interval(bench["blind"], bench["blind_interval_95"]),
            as_percent(bench["majority"]),
            str(bench["n"]),
            f"{bench['seconds_per_item']:.2f}",
            bench["note"],
        )
        for category, score in bench["by_category"].items():
            table.add_row(f"  {escape(category)}", as_percent(score), style="dim")
        table.add_section()
    return table


def _title(results: Mapping[str, Any]) -> str:
    adapter = results.get("adapter")
    return f"{results['model']}{f' + {adapter}' if adapter else ''}"


def comparison_table(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Table:
    """Build the table of two evaluations of the same questions, scores in per cent.

    Args:
        before: Results.
        after: Results.
        changes: From ``compare_folders``; without it the difference has no interval.
    """
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("bench")
    for heading in ("before (95 %)", "after (95 %)", "change", "no picture", "majority", "n"):
        table.add_column(heading, justify="right")
    for name, new in after["benches"].items():
        old = before["benches"].get(name)
        if old is None:
            continue
        change = change_text(old["score"], new["score"], (changes or {}).get(name))
        table.add_row(
            f"{escape(bench_title(name, after))}\n{new['metric']}",
            with_interval(old["score"], old["interval_95"]),
            with_interval(new["score"], new["interval_95"]),
            change,
            as_percent(new["blind"]),
            as_percent(new["majority"]),
            str(new["n"]),
        )
        for category, score in new["by_category"].items():
            first = old["by_category"].get(category)
            shown = change_text(first, score, None)
            cells = (f"  {escape(category)}", as_percent(first), as_percent(score), shown)
            table.add_row(*cells, style="dim")
        table.add_section()
    return table


def change_text(old: float | None, new: float | None, change: Mapping[str, Any] | None) -> str:
    """Write "+12.3 (+8.1 to +16.0)": a change in points of per cent, with its paired interval."""
    if old is None or new is None:
        return "–"
    text = f"{100 * (new - old):+.1f}"
    if change is not None:
        low, high = change["interval_95"]
        text += f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return text
