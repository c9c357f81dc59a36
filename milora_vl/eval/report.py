"""Results for readers: the terminal table, and the HTML report of a run as one file.

A report never fails a run: what cannot be shown is named in its place. All foreign text is escaped.
"""

import html
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from milora_vl.adapter.certificate import Certificate
from milora_vl.adapter.update_size import summarize_update
from milora_vl.eval import pages, plots
from milora_vl.eval.bench_files import read_json_lines, read_json_object, shorten
from milora_vl.eval.comparison import compare_folders, read_comparison
from milora_vl.eval.forgetting import compare_text_loss, forgetting_text
from milora_vl.eval.pages import parts_or_reason
from milora_vl.files import write_text_atomic

__all__ = [
    "compare_folders",
    "print_comparison",
    "print_results",
    "read_comparison",
    "write_report",
]

logger = logging.getLogger(__name__)

_LAYERS_SHOWN = 10
_OUTCOMES = (  # title, was right, is right, how many to show
    ("wrong → right", False, True, 3),
    ("right → wrong", True, False, 2),
    ("still wrong", False, False, 2),
    ("right both times", True, True, 1),
)


def render_report(
    run_folder: Path,
    comparison: Mapping[str, Any] | None,
    *,
    data_dir: Path | None = None,
    remarks: Sequence[str] = (),
) -> str:
    """Build the report of a run folder; a part without its file is skipped, a damaged one named.

    Args:
        run_folder: May hold ``eval_before/``, ``eval_after/``, ``metrics.jsonl``,
            ``certificate.json``, ``environment.json`` and ``config.yaml``.
        comparison: From ``read_comparison``.
        data_dir: Where the benches' files are, for images; None: as recorded by the evaluation.
        remarks: What to say first.

    Returns:
        HTML text.
    """
    parts = [f"<h1>Run {html.escape(run_folder.resolve().name)}</h1>"]
    parts += [f"<p><b>{html.escape(text)}</b></p>" for text in remarks]
    sections: list[tuple[str, Callable[[], list[str]]]] = []
    if comparison is not None:
        sections += [
            ("Scores", partial(_scores, comparison)),
            ("The figure of scores", partial(_score_figure, comparison)),
            *_categories(comparison),
            ("Forgetting", partial(_forgetting, comparison)),
        ]
    sections.append(("Training", partial(_training, run_folder)))
    if comparison is not None:
        gallery = partial(_gallery, run_folder, comparison, data_dir)
        sections.append(("Questions and answers", gallery))
    sections.append(("Init certificate", partial(_certificate, run_folder)))
    sections.append(("Size of the update", partial(_update, run_folder)))
    sections.append(("Settings and environment", partial(_files, run_folder)))
    for title, build in sections:
        parts += parts_or_reason(title, build)
    return pages.page(run_folder.resolve().name, parts)


def _training(run_folder: Path) -> list[str]:
    metrics = run_folder / "metrics.jsonl"
    return pages.training_part({"": read_json_lines(metrics)}) if metrics.is_file() else []


def _certificate(run_folder: Path) -> list[str]:
    file = run_folder / "certificate.json"
    if not file.is_file():
        return []
    return pages.certificate_part(Certificate.from_json(file.read_text(encoding="utf-8")))


def _update(run_folder: Path) -> list[str]:
    """Show how far training moved the weights: over its steps, and layer by layer at the end."""
    metrics, file = run_folder / "metrics.jsonl", run_folder / "certificate.json"
    if not (metrics.is_file() and file.is_file()):
        return []
    entries = [line for line in read_json_lines(metrics) if "update_norm_ratio" in line]
    if not entries:
        return []
    certificate = Certificate.from_json(file.read_text(encoding="utf-8"))
    line, rows = summarize_update(entries[-1], [layer.name for layer in certificate.layers])
    body = [
        (name, f"{100 * ratio:.3g}", f"{100 * share:.3g}")
        for name, ratio, share in rows[:_LAYERS_SHOWN]
    ]
    heads = ("layers that moved most", "update / weight, %", "in the strongest directions, %")
    return [
        "<h2>Size of the update</h2>",
        f"<p>At step {entries[-1]['step']} {html.escape(line)}. Larger updates forget more.</p>",
        pages.figure(plots.plot_update(entries), "size of the update over optimizer steps"),
        pages.html_table(heads, body),
    ]


def _scores(comparison: Mapping[str, Any]) -> list[str]:
    notes = [f"<br>{html.escape(note)}" for note in pages.results_notes(comparison["after"])]
    return [
        "<h2>Scores</h2>",
        "<p>Per cent, with 95 % intervals (bootstrap over questions or images; the change is"
        " paired). “No image” is the trained model asked without the image, “majority” the best"
        " constant guess.</p>",
        pages.html_table(
            pages.COMPARISON_HEADS, pages.comparison_rows(**comparison, categories=False)
        ),
        f"<p><small>{''.join(notes)}</small></p>",
    ]


def _score_figure(comparison: Mapping[str, Any]) -> list[str]:
    before, after = comparison["before"], comparison["after"]
    entries = {
        pages.bench_title(name, after): (before["benches"][name], new)
        for name, new in after["benches"].items()
        if name in before["benches"] and new["score"] is not None
    }
    if not entries:
        return []
    drawn = plots.plot_scores(("before", "after"), entries, with_guesses=True)
    return [pages.figure(drawn, "scores before and after with intervals")]


def _categories(comparison: Mapping[str, Any]) -> list[tuple[str, Callable[[], list[str]]]]:
    """Return a section for each bench, so that a damaged one does not take the others with it."""
    before, after = comparison["before"]["benches"], comparison["after"]
    titles = {name: pages.bench_title(name, after) for name in after["benches"] if name in before}
    return [
        (f"{title} by category", partial(_category_figure, title, before[name], new))
        for name, title in titles.items()
        if (new := after["benches"][name])
    ]


def _category_figure(title: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if len(new["by_category"]) < 2:
        return []
    encoded = plots.plot_categories(old["by_category"], new["by_category"], pages.scale_of(new))
    parts = [f"<h3>{html.escape(title)}</h3>", pages.figure(encoded, f"{title} by category")]
    n_hidden = len(new["by_category"]) - plots.MOST_BARS
    if n_hidden > 0:
        parts.append(f"<p>{n_hidden} more categories are in results.json.</p>")
    return parts


def _forgetting(comparison: Mapping[str, Any]) -> list[str]:
    probes = [comparison[when].get("text_probe") for when in ("before", "after")]
    change = compare_text_loss(*probes) if all(probes) else None
    if change is None:
        return []
    lines = "<br>".join(
        f"{html.escape(name.replace('_', ' '))}: {value}"
        for name, value in forgetting_text(change).items()
    )
    return [
        "<h2>Forgetting</h2><p>Loss on short texts without images, none of them trained on."
        f" A ratio of 1: nothing was forgotten.</p><p>{lines}</p>"
    ]


def _gallery(run_folder: Path, comparison: Mapping[str, Any], data_dir: Path | None) -> list[str]:
    """Show some questions of every outcome, with both answers."""
    data = comparison["after"].get("data")
    folder = data_dir or (None if data is None else Path(data))
    old, new = (
        {(line["bench"], line["id"]): line for line in read_json_lines(run_folder / name)}
        for name in ("eval_before/predictions.jsonl", "eval_after/predictions.jsonl")
    )
    parts = ["<h2>Questions and answers</h2>"]
    for name in comparison["after"]["benches"]:
        keys = [key for key in new if key in old and key[0] == name and new[key]["answers"]]
        if not keys:
            continue
        items = pages.read_items(name, folder)
        counts, cards = [], []
        for title, was_right, stays_right, n_shown in _OUTCOMES:
            chosen = [
                key
                for key in keys
                if [pages.is_right(lines[key]["score"]) for lines in (old, new)]
                == [was_right, stays_right]
            ]
            counts.append(f"{len(chosen)} {title}")
            # spread over the file, so that not all are of one category
            shown = chosen[:: max(1, len(chosen) // n_shown)][:n_shown]
            cards += [
                pages.card(new[key], [("before", old[key]), ("after", new[key])], items.get(key[1]))
                for key in shown
            ]
        parts += [
            f"<h3>{html.escape(pages.bench_title(name, comparison['after']))}</h3>",
            f"<p>Chosen by outcome, not in proportion; of {len(keys)}: {', '.join(counts)}.</p>",
            f'<div class="cards">{"".join(cards)}</div>',
        ]
    return parts


def _files(run_folder: Path) -> list[str]:
    """Show settings and environment as they are."""
    parts = []
    config = run_folder / "config.yaml"
    if config.is_file():
        text = html.escape(config.read_text(encoding="utf-8"))
        parts.append(f"<h2>Settings</h2><pre>{text}</pre>")
    environment = run_folder / "environment.json"
    if environment.is_file():
        content = read_json_object(environment)
        # the manifest lists every file: its head is enough here
        manifest = content.pop("data_manifest", None) or {}
        names = ("name", "version", "size", "seed", "pictures_sha256")
        content["data"] = {name: manifest[name] for name in names if name in manifest}
        text = html.escape(json.dumps(content, indent=2, ensure_ascii=False))
        parts.append(f"<h2>Environment</h2><pre>{text}</pre>")
    return parts


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table of one evaluation and the remarks on its benches."""
    console = console or Console()
    console.print(pages.results_table(results))
    for line in pages.results_notes(results):
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
    rows = pages.comparison_rows(before, after, changes)
    (console or Console()).print(pages.score_table(pages.COMPARISON_HEADS, rows))


def write_report(run_folder: Path | str, *, data_dir: Path | str | None = None) -> Path:
    """Write ``report.html`` into a run folder; see ``render_report``.

    Args:
        run_folder: With ``eval_before/`` and ``eval_after/``, ``metrics.jsonl``,
            ``certificate.json``, ``config.yaml``, ``environment.json``, or some of them.
        data_dir: Where the benches' files are, for images; None: as recorded by the evaluation.

    Returns:
        The file.
    """
    run_folder = Path(run_folder)
    comparison, problem = None, []
    try:
        comparison = read_comparison(run_folder)
    except (OSError, ValueError, KeyError) as error:
        problem = [f"The two evaluations cannot be compared: {shorten(str(error), 500)}"]
        logger.warning("%s", problem[0])
    text = render_report(
        run_folder,
        comparison,
        data_dir=None if data_dir is None else Path(data_dir),
        remarks=problem,
    )
    path = run_folder / "report.html"
    write_text_atomic(path, text)
    return path
