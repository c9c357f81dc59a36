"""Figures of the report, drawn without a display and returned as base64 PNG text."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by people with any colour vision.
BEFORE, AFTER, BLIND, MAJORITY = "#999999", "#0072B2", "#D55E00", "#333333"
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DPI = 110


def finish_figure(figure: Figure) -> str:
    """Draw a figure without its upper and right borders. Returns base64 PNG."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def plot_scores(
    rows: Sequence[tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]],
) -> str:
    """Draw scores with their 95 % intervals, before and after, beside what needs no picture.

    Args:
        rows: (title, results before or None, results after) of each bench.

    Returns:
        Base64 PNG.
    """
    figure = Figure(figsize=(7.5, 0.9 + 0.85 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for place, (_, before, after) in enumerate(rows):
        for bench, colour, shift, label in (
            (before, BEFORE, -0.16, "before"),
            (after, AFTER, 0.16, "after"),
        ):
            if bench is None or bench["score"] is None:
                continue
            share = bench.get("maximum", 1.0)  # points are drawn as a share of their maximum
            score = bench["score"] / share
            low, high = (end / share for end in bench["interval_95"] or [bench["score"]] * 2)
            axes.errorbar(
                100 * score,
                place + shift,
                # a percentile interval need not hold the score itself
                xerr=[[100 * max(0.0, score - low)], [100 * max(0.0, high - score)]],
                fmt="o",
                color=colour,
                capsize=4,
                label=label if place == len(rows) - 1 else None,
            )
        for name, marker, colour in (("blind", "x", BLIND), ("majority", "|", MAJORITY)):
            if after.get(name) is not None:
                label = "no picture" if name == "blind" else "majority"
                axes.scatter(
                    100 * after[name] / after.get("maximum", 1.0),
                    place + (0.16 if name == "blind" else 0),
                    marker=marker,
                    s=80,
                    color=colour,
                    label=label if place == len(rows) - 1 else None,
                    zorder=3,
                )
    axes.set_yticks(range(len(rows)), [title for title, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("score in per cent, with its 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return finish_figure(figure)


def plot_categories(
    before: Mapping[str, float] | None, after: Mapping[str, float], scale: float = 100.0
) -> str:
    """Draw the scores of a bench's categories as bars, before and after. Returns base64 PNG."""
    names = list(after)
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(names)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    height = 0.38 if before else 0.7
    places = range(len(names))
    if before:
        axes.barh(
            [place - height / 2 for place in places],
            [scale * before.get(name, 0.0) for name in names],
            height,
            color=BEFORE,
            label="before",
        )
    axes.barh(
        [place + (height / 2 if before else 0) for place in places],
        [scale * after[name] for name in names],
        height,
        color=AFTER,
        label="after",
    )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    if scale == 100:
        axes.set_xlim(0, 100)
    axes.set_xlabel("score in per cent" if scale == 100 else "points")
    if before:
        axes.legend(frameon=False)
    return finish_figure(figure)


def plot_curves(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """Draw the losses of each training stage over its steps.

    Args:
        entries: Lines of ``metrics.jsonl``: ``stage``, ``step``, values with units in their keys.

    Returns:
        Base64 PNG, or None if no line holds a loss.
    """
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in entries:
        for name, value in entry.items():
            is_loss = "loss" in name and name != "train_loss"
            if is_loss and isinstance(value, (int, float)) and "step" in entry:
                stage = stages.setdefault(str(entry.get("stage", "training")), {})
                stage.setdefault(name, []).append((entry["step"], value))
    if not stages:
        return None
    width = 4.2 * len(stages) if len(stages) > 1 else 7.5
    figure = Figure(figsize=(width, 3.2), dpi=DPI, layout="constrained")
    for axes, (stage, series) in zip(
        figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True
    ):
        for colour, (name, points) in zip(
            CURVE_COLOURS * len(series), series.items(), strict=False
        ):
            steps, values = zip(*points, strict=True)
            style = "o-" if len(points) <= 12 else "-"
            axes.plot(steps, values, style, color=colour, label=name.replace("_", " "))
        axes.set_title(stage)
        axes.set_xlabel("optimiser step")
        axes.legend(frameon=False, fontsize="small")
    return finish_figure(figure)
