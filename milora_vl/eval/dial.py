"""Gain against retention: one trained model evaluated at several strengths of its update.

The model is loaded once and its dial turned (``milora_vl.export.strength``). At each strength the
benches say what is gained, and the loss on fixed texts, or benches of other tasks, what is kept.
All changes are paired with strength 0, the base itself, question by question and text by text.
"""

import html
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.config import EvalSection, load_config
from milora_vl.eval import plots
from milora_vl.eval.bench_files import read_json_object
from milora_vl.eval.comparison import compare_folders
from milora_vl.eval.evaluation import bench_names, evaluate, load_items
from milora_vl.eval.forgetting import compare_text_loss
from milora_vl.eval.pages import (
    bench_title,
    figure,
    html_table,
    page,
    parts_or_reason,
    scale_of,
    with_interval,
)
from milora_vl.export.source import read_source, warn_of_another_processor
from milora_vl.export.strength import Strength
from milora_vl.files import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXT = "text"  # the retention that is always measured


def turn_dial(  # noqa: PLR0913  settings by keyword
    run: Path | str,
    out: Path | str,
    *,
    strengths: Sequence[float] = STRENGTHS,
    benches: str | None = None,
    retention: Sequence[str] = (),
    data_dir: Path | str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    base: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a trained model at several strengths; write ``dial.json`` and ``dial.html``.

    Args:
        run: Run, checkpoint or adapter folder.
        out: Where results go, an evaluation folder for each strength among them.
        strengths: Of the update; 0 is added where it is missing, as all is compared with it.
        benches: What is gained, as in ``evaluate``; None: those of the run's config.
        retention: Which of the benches stand for what is to be kept, beside the text probe.
        data_dir: The benches' files; None: as the run's config says, else their hub mirrors.
        limit: Most questions of a bench; None: as the run's config says.
        batch_size: Prompts in one forward pass; None: as the run's config says.
        base: Id or path of the base; default: as recorded.
        device: Where the model runs.
        progress: Show progress bars.

    Returns:
        What is written to ``dial.json``.

    Raises:
        ValueError: If no bench is known, a bench or strength is none, or the adapter has no dial.
        FileNotFoundError: If there is no adapter, or a bench's files are missing.
    """
    out, section = Path(out), _settings_of(Path(run))
    asked = benches or ",".join(section.benches)
    if not asked:
        raise ValueError(f"{run} names no benches; pass --bench, and --data for their files")
    names = bench_names(asked)
    kept = bench_names(list(retention)) if retention else []
    if unknown := [name for name in kept if name not in names]:
        raise ValueError(f"--retention {unknown[0]} is none of the benches asked: {names}")
    files = data_dir or section.data_dir
    folder = Path(files) if files else None
    limit = limit or section.limit
    items = load_items(names, folder, limit)  # a slip shows before the model is loaded
    vlm, source = _load(run, base, device)
    dial = Strength(vlm.model)
    rows: list[dict[str, Any]] = []
    for strength in sorted({0.0, *(float(one) for one in strengths)}):
        dial.set_(strength)
        place = out / f"strength_{strength:g}"
        shutil.rmtree(place, ignore_errors=True)  # of another adapter, or another list of benches
        logger.info("strength %g", strength)
        evaluate(
            vlm,
            names,
            folder,
            place,
            batch_size=batch_size or section.batch_size,
            limit=limit,
            blind=False,
            items=items,
            model_name=source.base,
            adapter_name=f"{source.folder} at strength {strength:g}",
            progress=progress,
        )
        rows.append(_row(strength, out / "strength_0", place))
    dial.set_(1.0)
    result = {
        "adapter": str(source.folder),
        "base": source.base,
        "gain": [name for name in names if name not in kept],
        "retention": [TEXT, *kept],
        "strengths": rows,
    }
    write_json_atomic(out / "dial.json", result)
    write_text_atomic(out / "dial.html", render_dial(result))
    return result


def _settings_of(run: Path) -> EvalSection:
    for parent in (run, *list(run.resolve().parents)[:2]):
        if (parent / "config.yaml").exists():
            return load_config(parent / "config.yaml").eval
    return EvalSection()


def _load(run: Path | str, base: str | None, device: str) -> tuple[Any, Any]:
    """Return the base with its adapter beside it, weights untouched, and where they came from."""
    source = read_source(run, base, device, "auto")
    vlm = source.load(quantized=True)
    warn_of_another_processor(source.metadata, vlm.processor)
    if vlm.float_weights is not None:
        logger.warning(
            "the base is in 4 bits: each strength adds to NF4(W), while training added to the "
            "residual NF4(W_p); strength 1 differs from the trained model by that error"
        )
    return vlm.with_model(source.attach(vlm, residual="anchor").eval()), source


def _row(strength: float, base: Path, place: Path) -> dict[str, Any]:
    """Return the scores at one strength, with what changed against strength 0."""
    before, after = (read_json_object(folder / "results.json") for folder in (base, place))
    changes = compare_folders(base, place)
    benches = {
        name: {
            "score": entry["score"],
            "interval_95": entry.get("interval_95"),
            "scale": scale_of(entry),
            "title": bench_title(name, after),
            "change": changes.get(name, {}).get("difference"),
            "change_interval_95": changes.get(name, {}).get("interval_95"),
        }
        for name, entry in after["benches"].items()
    }
    probes = before.get("text_probe"), after.get("text_probe")
    text = compare_text_loss(*probes) if all(probes) else None
    return {"strength": strength, "benches": benches, TEXT: text}


def render_dial(result: Mapping[str, Any]) -> str:
    """Return the page of a dial as HTML that loads nothing from elsewhere."""
    title = f"Dial of {Path(result['adapter']).resolve().parent.name}"
    first = result["strengths"][0]
    titles = {name: entry["title"] for name, entry in first["benches"].items()}
    heads = ["strength", "text perplexity over the base's"]
    for text in titles.values():
        heads += [text, "change"]
    body = []
    for row in result["strengths"]:
        cells = [f"{row['strength']:g}", _ratio_text(row[TEXT])]
        for name in titles:
            entry = row["benches"][name]
            scale = entry["scale"]
            cells += [
                with_interval(entry["score"], entry["interval_95"], scale),
                with_interval(entry["change"], entry["change_interval_95"], scale),
            ]
        body.append(cells)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>The same trained model at several strengths of its update: 0 is the base, 1 what was"
        " trained. Intervals are 95 % (bootstrap over questions, images or texts; changes are"
        " paired with strength 0). Texts were not trained on: a perplexity ratio of 1 means that"
        f" nothing was forgotten. Adapter: <code>{html.escape(result['adapter'])}</code>.</p>",
    ]
    parts += parts_or_reason(
        "The figure",
        lambda: [
            figure(
                plots.plot_dial(_series(result, measure), _axis_name(measure, titles)),
                f"gain against retention ({measure}) at each strength",
            )
            for measure in result["retention"]
            if all(_retained(row, measure) for row in result["strengths"])
        ],
    )
    parts += [html_table(heads, body), _advice(result)]
    return page(title, parts)


def _series(result: Mapping[str, Any], measure: str) -> dict[str, list[tuple[float, ...]]]:
    """Return title -> points (strength, x, x low, x high, y, y low, y high) of each gain."""
    series: dict[str, list[tuple[float, ...]]] = {}
    for row in result["strengths"]:
        for name in result["gain"]:
            entry = row["benches"][name]
            if entry["score"] is not None:
                value = _with_ends(entry["score"], entry["interval_95"], entry["scale"])
                points = series.setdefault(entry["title"], [])
                points.append((row["strength"], *_retained(row, measure), *value))
    return series


def _retained(row: Mapping[str, Any], measure: str) -> tuple[float, float, float] | None:
    if measure == TEXT:
        text = row[TEXT]
        if text is None:
            return None
        interval = text["text_perplexity_ratio_interval_95"]
        return _with_ends(text["text_perplexity_ratio"], interval, 1.0)
    entry = row["benches"][measure]
    if entry["score"] is None:
        return None
    return _with_ends(entry["score"], entry["interval_95"], entry["scale"])


def _with_ends(
    value: float, interval: Sequence[float] | None, scale: float
) -> tuple[float, float, float]:
    low, high = interval or (value, value)
    return scale * value, scale * low, scale * high


def _axis_name(measure: str, titles: Mapping[str, str]) -> str:
    return "text perplexity over the base's" if measure == TEXT else titles[measure]


def _ratio_text(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return "not measured"
    low, high = text["text_perplexity_ratio_interval_95"]
    return f"{text['text_perplexity_ratio']:.4f} ({low:.4f} to {high:.4f})"


def _advice(result: Mapping[str, Any]) -> str:
    """Say how to keep a strength."""
    adapter = html.escape(json.dumps(result["adapter"], ensure_ascii=False))
    return (
        f"<p>Export one: <code>milora-vl export {adapter} --strength 0.75 --out OUT</code>, in any"
        " form.</p>"
    )
