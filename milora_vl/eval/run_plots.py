"""Figures that set several runs side by side, as base64 PNG text."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from milora_vl.eval.plots import CURVE_COLOURS, DPI, finish_figure


def plot_run_scores(names: Sequence[str], entries: Mapping[str, Sequence[Any]]) -> str:
    """Draw every bench's scores with their 95 % intervals, one colour a run.

    Args:
        names: Of the runs.
        entries: Title of a bench -> results of each run, None where it has none. A bench with its
            own points is drawn as a share of its maximum.

    Returns:
        Base64 PNG.
    """
    height = 1.0 + len(entries) * (0.3 + 0.16 * len(names))
    figure = Figure(figsize=(7.5, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    step = 0.7 / max(1, len(names))
    for run, name in enumerate(names):
        colour = CURVE_COLOURS[run % len(CURVE_COLOURS)]
        axes.plot([], [], "o", color=colour, label=name)
        for place, results in enumerate(entries.values()):
            entry = results[run]
            if entry is None or entry["score"] is None:
                continue
            scale = 100 / entry.get("maximum", 1.0)
            score = scale * entry["score"]
            low, high = (scale * end for end in entry["interval_95"] or [entry["score"]] * 2)
            axes.errorbar(
                score,
                place + (run - (len(names) - 1) / 2) * step,
                xerr=[[max(0.0, score - low)], [max(0.0, high - score)]],
                fmt="o",
                markersize=4,
                capsize=3,
                color=colour,
            )
    axes.set_yticks(range(len(entries)), list(entries))
    axes.invert_yaxis()
    axes.set_xlabel("score in per cent (MME: of its maximum), with its 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=min(3, len(names)), frameon=False)
    return finish_figure(figure)


def plot_run_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Draw training (line) and validation (dots) losses of the runs' last stage over its steps.

    Args:
        logs: Name of a run -> lines of its ``metrics.jsonl``.

    Returns:
        Base64 PNG, or None if no run has logged a loss.
    """
    figure = Figure(figsize=(7.5, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    n_drawn = 0
    for place, (name, entries) in enumerate(logs.items()):
        colour = CURVE_COLOURS[place % len(CURVE_COLOURS)]
        stage = entries[-1].get("stage") if entries else None
        for key, style in (("loss_nats_per_token", "-"), ("validation_loss_nats_per_token", "o")):
            points = [
                (entry["step"], entry[key])
                for entry in entries
                if key in entry and entry.get("stage") == stage
            ]
            if points:
                label = None if style == "o" else f"{name}: {stage}"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
                n_drawn += 1
    if not n_drawn:
        return None
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False, fontsize="small")
    return finish_figure(figure)
