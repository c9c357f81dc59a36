"""Figures of one run and of several side by side, drawn without a display, as base64 PNG text.

Names come from files: each is cut to one line, and none is read as a formula.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from milora_vl.eval.bench_files import printable, shorten

# Okabe and Ito's palette, told apart by people with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_GUESS = "#333333"
_GUESSES = (("blind", "no image", "x"), ("majority", "majority", "|"))
DPI = 110
MOST_BARS = 60
"""Most categories drawn; more cannot be read, and a figure has a largest size."""
_LONGEST_NAME_CHARS = 48


def label_of(name: str) -> str:
    """Return a name for a figure: on one line, not longer than the figure, never hidden."""
    text = shorten(" ".join(printable(name).split()), _LONGEST_NAME_CHARS)
    return f" {text}" if text.startswith("_") else text  # matplotlib drops "_" from legends


def finish_figure(figure: Figure) -> str:
    """Draw a figure without its upper and right borders. Returns base64 PNG."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a "$" in a name is no formula
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_score(axes: Axes, bench: Mapping[str, Any] | None, height: float, **style: Any) -> None:
    """Draw a score with its interval in per cent; points, such as MME's, of their maximum."""
    if bench is None or bench["score"] is None:
        return
    scale = 100 / bench.get("maximum", 1.0)
    score = scale * bench["score"]
    low, high = (scale * end for end in bench["interval_95"] or [bench["score"]] * 2)
    # a percentile interval need not hold the score itself
    reach = [[max(0.0, score - low)], [max(0.0, high - score)]]
    axes.errorbar(score, height, xerr=reach, fmt="o", **style)


def plot_scores(
    names: Sequence[str],
    entries: Mapping[str, Sequence[Mapping[str, Any] | None]],
    *,
    with_guesses: bool = False,
) -> str:
    """Draw every bench's scores with their 95 % intervals, one color a run.

    Args:
        names: Of the runs.
        entries: Title of a bench -> results of each run, None where it has none. A bench with its
            own points is drawn as a share of its maximum.
        with_guesses: Draw what the last run scores without the image, and the best constant guess.

    Returns:
        Base64 PNG.
    """
    height = 1.0 + len(entries) * (0.3 + 0.16 * len(names))
    figure = Figure(figsize=(7.5, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    step = 0.7 / max(1, len(names))
    for run, name in enumerate(names):
        color = COLORS[run % len(COLORS)]
        axes.plot([], [], "o", color=color, label=label_of(name))
        for place, results in enumerate(entries.values()):
            row = place + (run - (len(names) - 1) / 2) * step
            _draw_score(axes, results[run], row, capsize=3, color=color, markersize=4)
    for key, label, marker in _GUESSES if with_guesses else ():
        last = [results[-1] for results in entries.values()]
        found = [(place, one) for place, one in enumerate(last) if one and one.get(key) is not None]
        shares = [100 * one[key] / one.get("maximum", 1.0) for _, one in found]
        style = {"marker": marker, "color": _GUESS, "label": label, "zorder": 3}
        axes.scatter(shares, [place for place, _ in found], s=60, **style)
    axes.set_yticks(range(len(entries)), [label_of(name) for name in entries])
    axes.invert_yaxis()
    axes.set_xlabel("score in per cent (MME: of its maximum), with its 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return finish_figure(figure)


def plot_categories(
    before: Mapping[str, float], after: Mapping[str, float], scale: float = 100.0
) -> str:
    """Draw a bench's first ``MOST_BARS`` categories as bars, before and after, as base64 PNG."""
    names = list(after)[:MOST_BARS]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(names)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    places, height = range(len(names)), 0.38
    for label, scores, shift, color in (
        ("before", before, -height / 2, COLORS[0]),
        ("after", after, height / 2, COLORS[1]),
    ):
        rows = [place + shift for place in places]
        lengths = [scale * (scores.get(name) or 0.0) for name in names]
        axes.barh(rows, lengths, height, color=color, label=label)
    axes.set_yticks(places, [label_of(name) for name in names])
    axes.invert_yaxis()
    if scale == 100:
        axes.set_xlim(0, 100)
    axes.set_xlabel("score in per cent" if scale == 100 else "points")
    axes.legend(frameon=False)
    return finish_figure(figure)


def plot_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Draw the losses of each training stage over its steps.

    Args:
        logs: Name of a run -> lines of its ``metrics.jsonl``: ``stage``, ``step``, and values with
            units in their keys.

    Returns:
        Base64 PNG, or None if no line holds a loss.
    """
    stages: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for run, entries in logs.items():
        for entry in entries:
            for key, value in entry.items():
                is_loss = "loss" in key and key != "train_loss"
                if is_loss and isinstance(value, (int, float)) and "step" in entry:
                    series = stages.setdefault(str(entry.get("stage", "training")), {})
                    series.setdefault((run, key), []).append((entry["step"], value))
    if not stages:
        return None
    width = 4.2 * len(stages) if len(stages) > 1 else 7.5
    figure = Figure(figsize=(width, 3.2), dpi=DPI, layout="constrained")
    for axes, (stage, series) in zip(
        figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True
    ):
        for place, ((run, key), points) in enumerate(series.items()):
            name = f"{run}: {key}" if len(logs) > 1 else key
            style = "o-" if len(points) <= 12 else "-"
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=COLORS[place % len(COLORS)],
                label=label_of(name.replace("_", " ")),
            )
        axes.set_title(label_of(stage))
        axes.set_xlabel("optimizer step")
        axes.legend(frameon=False, fontsize="small")
    return finish_figure(figure)


def plot_dial(series: Mapping[str, Sequence[tuple[float, ...]]], retention: str) -> str:
    """Draw gain (up) against retention (along) at several strengths, both with their intervals.

    Args:
        series: Title of a bench -> points (strength, x, x low, x high, y, y low, y high).
        retention: What x is.

    Returns:
        Base64 PNG.
    """
    figure = Figure(figsize=(7.5, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for color, (title, points) in zip(COLORS * len(series), series.items(), strict=False):
        strengths, *columns = zip(*points, strict=True)
        (x, x_low, x_high), (y, y_low, y_high) = columns[:3], columns[3:]
        reach = [
            # a percentile interval need not hold the value itself
            [[max(0.0, a - b) for a, b in zip(value, low, strict=True)],
             [max(0.0, b - a) for a, b in zip(value, high, strict=True)]]
            for value, low, high in ((x, x_low, x_high), (y, y_low, y_high))
        ]  # fmt: skip
        style = {"fmt": "o-", "capsize": 2, "color": color, "elinewidth": 0.7}
        axes.errorbar(x, y, xerr=reach[0], yerr=reach[1], label=label_of(title), **style)
        for strength, *place in zip(strengths, x, y, strict=True):
            axes.annotate(
                f"{strength:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8
            )
    axes.set_xlabel(label_of(retention))
    axes.set_ylabel("score in per cent (MME: points)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return finish_figure(figure)


def plot_update(entries: Sequence[Mapping[str, Any]]) -> str:
    """Draw the norm of the update, and its share in the strongest directions, over the steps.

    Args:
        entries: Lines of ``metrics.jsonl`` that hold what ``UpdateMeter.measure`` returned.

    Returns:
        Base64 PNG.
    """
    figure = Figure(figsize=(7.5, 2.8), dpi=DPI, layout="constrained")
    names = {
        "update_norm_ratio": "update / weights, %",
        "update_principal_share": "in their strongest directions, %",
    }
    for axes, color, (key, name) in zip(figure.subplots(1, 2), COLORS, names.items(), strict=False):
        axes.plot([e["step"] for e in entries], [100 * e[key] for e in entries], color=color)
        axes.set_ylabel(name)
        axes.set_xlabel("optimizer step")
        axes.set_ylim(bottom=0)
    last = entries[-1]["update_principal_share_if_random"]
    axes.axhline(100 * last, color=_GUESS, linestyle=":", label="without preference")
    axes.legend(frameon=False, fontsize="small")
    return finish_figure(figure)
