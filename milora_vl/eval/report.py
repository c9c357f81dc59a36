"""Results for people: terminal tables and the HTML report of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from milora_vl.eval.comparison import compare_folders, read_comparison
from milora_vl.eval.html_report import render_report
from milora_vl.eval.tables import comparison_table, results_notes, results_table
from milora_vl.files import write_text_atomic

__all__ = [
    "compare_folders",
    "print_comparison",
    "print_results",
    "read_comparison",
    "write_report",
]


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table of one evaluation and the remarks on its benches."""
    console = console or Console()
    console.print(results_table(results))
    for line in results_notes(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_comparison(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    console: Console | None = None,
) -> None:
    """Print the table of two evaluations of the same questions.

    Args:
        before: Results, as in ``results.json``.
        after: Results.
        changes: From ``compare_folders``: adds the interval of each change.
        console: Where to; None: standard output.
    """
    (console or Console()).print(comparison_table(before, after, changes))


def write_report(run_folder: Path | str, *, data_dir: Path | str | None = None) -> Path:
    """Write ``report.html`` into a run folder; what the folder lacks, the report leaves out.

    Args:
        run_folder: With ``eval_before/`` and ``eval_after/``, ``metrics.jsonl``,
            ``certificate.json``, ``config.yaml``, ``environment.json``, or some of them.
        data_dir: Where the benches' files are, for pictures; None: as recorded by the evaluation.

    Returns:
        The file.

    Raises:
        ValueError: If a file is damaged, or the two evaluations cannot be compared.
    """
    run_folder = Path(run_folder)
    comparison = read_comparison(run_folder)
    text = render_report(
        run_folder, comparison, data_dir=None if data_dir is None else Path(data_dir)
    )
    path = run_folder / "report.html"
    write_text_atomic(path, text)
    return path
