"""Parts that reports are made of: numbers as text, terminal tables, and HTML that loads nothing.

All foreign text is escaped. A part that cannot be made is replaced by the reason, because a run of
hours must not end with its report.
"""

import base64
import html
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from milora_vl.adapter.certificate import Certificate
from milora_vl.eval import plots
from milora_vl.eval.bench_files import printable, shorten
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.items import Item
from milora_vl.eval.scoring import lettered

logger = logging.getLogger(__name__)

_IMAGE_PX = 180
_RIGHT_FROM = 0.5
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:right}
th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #999}
td small{color:#666}
img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow-x:auto;font-size:.8rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:1rem}
.card{border:1px solid #ddd;border-radius:.4rem;padding:.7rem;font-size:.85rem}
.card p{margin:.3rem 0;white-space:pre-line}.right::before{content:"✓ "}.wrong::before{content:"✗ "}
.right{color:#005a8c}.wrong{color:#a03c00}
"""


def scale_of(bench: Mapping[str, Any]) -> float:
    """Return what a score is multiplied by to be shown: 100, or 1 for a bench with its points."""
    return 1.0 if "maximum" in bench else 100.0


def as_percent(value: float | None, scale: float = 100.0) -> str:
    """Write a fraction as per cent with one decimal; a dash for None."""
    return "–" if value is None else f"{scale * value:.1f}"


def with_interval(value: float | None, interval: list[float] | None, scale: float = 100.0) -> str:
    """Write "61.0 (58.2 to 64.1)"."""
    if value is None or interval is None:
        return as_percent(value, scale)
    low, high = (as_percent(end, scale) for end in interval)
    return f"{as_percent(value, scale)} ({low} to {high})"


def bench_title(
    name: str, results: Mapping[str, Any], bench: Mapping[str, Any] | None = None
) -> str:
    """Name a bench; questions of another data set in its format are not called by its name.

    Args:
        name: Of the bench.
        results: Content of ``results.json``.
        bench: Its entry there, to name the metric on a second line, and the judge if there is one.
    """
    data_set = results.get("data_set")
    title = f"{data_set} ({name} format)" if data_set else name
    if bench is None:
        return title
    judge = bench.get("judge")
    judged = f", judged by {judge} with {bench.get('judge_prompt')}" if judge else ""
    return f"{title}\n{bench['metric'].replace('_', ' ')}{judged}"


def cell_text(text: str) -> str:
    """Return foreign text for a cell of a terminal table, where brackets would be markup."""
    return escape(printable(text))


def score_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
) -> Table:
    """Build a terminal table; a row whose first cell begins with a space belongs to the one before.

    Args:
        heads: Text above each column.
        rows: Plain text.
        title: Above the table.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title and cell_text(title), title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", overflow="fold")
    for row in rows:
        is_part = row[0].startswith(" ")
        if not is_part and table.row_count:
            table.add_section()
        table.add_row(*map(cell_text, row), style="dim" if is_part else None)
    return table


def results_table(results: Mapping[str, Any]) -> Table:
    """Build the table of one evaluation, scores in per cent."""
    rows = []
    for name, bench in results["benches"].items():
        scale = scale_of(bench)
        rows.append(
            (
                bench_title(name, results, bench),
                with_interval(bench["score"], bench["interval_95"], scale),
                with_interval(bench["blind"], bench["blind_interval_95"], scale),
                as_percent(bench["majority"], scale),
                str(bench["n"]),
                f"{bench['seconds_per_item']:.2f}",
            )
        )
        rows += [
            (f"  {name}", as_percent(one, scale)) for name, one in bench["by_category"].items()
        ]
    heads = ("bench", "score (95 %)", "no image", "majority", "n", "s/item")
    added = f" + {results['adapter']}" if results.get("adapter") else ""
    return score_table(heads, rows, f"{results['model']}{added}")


def results_notes(results: Mapping[str, Any]) -> list[str]:
    """Return what a reader should know beside the table: a line a remark, its bench in front."""
    lines = []
    for name, bench in results["benches"].items():
        if published := bench.get("published"):
            lines.append(f"{name}: published for LLaVA-1.5-7B: {published_text(published)}")
        lines += [f"{name}: {note}" for note in bench["note"].split("; ") if note]
    return [printable(line) for line in lines]


def published_text(published: Mapping[str, Any]) -> str:
    """Write "full 64.3, lora 66.1, milora 66.1 (dev, circular)"."""
    names = ("full", "lora", "milora")
    scores = ", ".join(f"{name} {published[name]}" for name in names if name in published)
    return f"{scores} ({published['split']})"


COMPARISON_HEADS = (
    *("bench", "before (95 %)", "after (95 %)", "change", "no image", "majority", "n"),
)


def comparison_rows(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    categories: bool = True,
) -> list[tuple[str, ...]]:
    """Return the rows of two evaluations of the same questions, scores in per cent.

    Args:
        before: Results.
        after: Results.
        changes: From ``compare_folders``; without it the difference has no interval.
        categories: Add a row for each category.
    """
    rows: list[tuple[str, ...]] = []
    for name, new in after["benches"].items():
        old = before["benches"].get(name)
        if old is None:
            continue
        scale = scale_of(new)
        rows.append(
            (
                bench_title(name, after, new),
                with_interval(old["score"], old["interval_95"], scale),
                with_interval(new["score"], new["interval_95"], scale),
                change_text(old["score"], new["score"], (changes or {}).get(name), scale),
                with_interval(new["blind"], new["blind_interval_95"], scale),
                as_percent(new["majority"], scale),
                str(new["n"]),
            )
        )
        for category, score in new["by_category"].items() if categories else ():
            first = old["by_category"].get(category)
            values = (as_percent(first, scale), as_percent(score, scale))
            rows.append((f"  {category}", *values, change_text(first, score, None, scale)))
    return rows


def change_text(
    old: float | None,
    new: float | None,
    change: Mapping[str, Any] | None,
    scale: float = 100.0,
) -> str:
    """Write "+12.3 (+8.1 to +16.0)": a change in points of per cent, with its paired interval."""
    if old is None or new is None:
        return "–"
    text = f"{scale * (new - old):+.1f}"
    if change is not None:
        low, high = change["interval_95"]
        text += f" ({scale * low:+.1f} to {scale * high:+.1f})"
    return text


def parts_or_reason(title: str, build: Callable[[], list[str]]) -> list[str]:
    """Return HTML parts, or the reason why they could not be made, in their place.

    Args:
        title: What the parts show.
        build: Makes them.
    """
    try:
        return build()
    except Exception as error:  # whatever it is, see above
        logger.warning("the report lacks %s: %s: %s", title, type(error).__name__, error)
        reason = html.escape(shorten(f"{type(error).__name__}: {error}", 500))
        return [f"<p><b>{html.escape(title)} cannot be shown:</b> {reason}</p>"]


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole HTML page; ``title`` is text, ``parts`` are HTML."""
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    return printable(text)


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return plain text as an HTML table; the first line of a cell is its title."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    lines = ("".join(f"<td>{_cell(text)}</td>" for text in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(text: str) -> str:
    first, *more = html.escape(text).split("\n", 1)
    return f"{first}<br><small>{more[0]}</small>" if more else first


def training_part(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the loss curves of runs by name as HTML; nothing if no loss was logged."""
    curves = plots.plot_curves(logs)
    return ["<h2>Training</h2>", figure(curves, "losses over optimizer steps")] if curves else []


def certificate_part(certificate: Certificate, title: str = "Init certificate") -> list[str]:
    """Return a certificate as HTML."""
    summary = html.escape(certificate.summary())
    return [f"<h2>{html.escape(title)}</h2>", f"<pre>{summary}</pre>"]


def card(
    asked: Mapping[str, Any], said: Sequence[tuple[str, Mapping[str, Any]]], item: Item | None
) -> str:
    """Return a question with the answers to it, as HTML.

    Args:
        asked: A line of ``predictions.jsonl``: question, options and right answers.
        said: Who answered, and the line with that answer.
        item: Has the image; None: none is shown.
    """
    question = "\n".join([asked["question"], *lettered(asked["options"])])
    right = asked["answers"][0] if asked["answers"] else "–"
    answers = "".join(
        f'<p class="{"right" if is_right(line["score"]) else "wrong"}">'
        f"{html.escape(name)}: {html.escape(line['text'] or repr(line['text']))}</p>"
        for name, line in said
    )
    return (
        f'<div class="card">{"" if item is None else thumbnail(item)}<p>{html.escape(question)}</p>'
        f"<p><b>right: {html.escape(right)}</b></p>{answers}</div>"
    )


def is_right(score: float) -> bool:
    """Tell whether a score counts as right in a gallery; a free answer may get part of a credit."""
    return score >= _RIGHT_FROM


def figure(encoded: str, text: str) -> str:
    """Return a figure from base64 PNG; ``text`` describes it."""
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{encoded}"></p>'


def read_items(name: str, data_dir: Path | None) -> dict[str, Item]:
    """Return a bench's items by id; nothing, and a warning, if its files cannot be read."""
    try:
        return {item.id: item for item in BENCHES[name].load(data_dir)}
    except (OSError, ValueError) as error:
        logger.warning("the report has no images of %s: %s", name, error)
        return {}


def thumbnail(item: Item) -> str:
    """Return an item's image, small, or the reason why it cannot be shown."""
    if item.image is None:
        return ""
    try:
        image = item.image.open()
    except (OSError, ValueError) as error:
        return f"<p>{html.escape(str(error))}</p>"
    image.thumbnail((_IMAGE_PX, _IMAGE_PX))
    buffer = io.BytesIO()
    # a page with dozens of images must stay small enough to send
    image.save(buffer, "JPEG", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
