"""Bars, digit strings and words: pictures that are not made of cut-outs, and their questions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
import numpy as np

from data_prep.sticker.names import Concept
from data_prep.sticker.pictures import PICTURE_PX, Plan, plan_background
from data_prep.sticker.questions import (
    BARS_QUESTION,
    IS_WORD_QUESTION,
    NUMBER_QUESTION,
    WORD_QUESTION,
    Item,
    Ledger,
)

TRAIN_TABLES = ("gapminder", "countries", "obesity", "budget")
BENCH_TABLES = ("penguins", "wheat")
TRAIN_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
)
BENCH_FONT = "STIXGeneralBol.ttf"
N_BARS = 4
_MIN_GAP_RATIO = 0.08


def font_path(name: str) -> str:
    """Return the path of a font shipped with matplotlib."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


def bar_series(tables: dict[str, Any], names: tuple[str, ...]) -> list[list[tuple[str, float]]]:
    """Turn some tables, parsed by name, into series of two or more short labels with values."""
    series = [row for name in names if name in tables for row in _READERS[name](tables[name])]
    return [
        kept
        for row in series
        if len(kept := [(label, value) for label, value in row if value > 0]) >= 2
    ]


def plan_chart(
    rng: Random, series: list[list[tuple[str, float]]], n_bars: int, *, held_out: bool
) -> Plan | None:
    """Plan a bar chart whose highest and lowest bars stand out; None if no such were found.

    ``series`` is from ``bar_series``; ``held_out`` takes background hues and font of the bench.
    """
    for _ in range(200):
        row = rng.choice(series)
        if len(row) < n_bars:
            continue
        bars = rng.sample(row, n_bars)
        values = sorted(value for _, value in bars)
        step = _MIN_GAP_RATIO * values[-1]
        # the highest and the lowest bar must be told apart by eye
        if values[-1] - values[-2] >= step and values[1] - values[0] >= step:
            break
    else:
        return None
    background = {**plan_background(rng, held_out=held_out), "kind": "plain"}
    colors = [tuple(rng.randrange(30, 200) for _ in range(3)) for _ in bars]
    font = BENCH_FONT if held_out else rng.choice(TRAIN_FONTS[:4])
    size_px = 17 if max(len(label) for label, _ in bars) * n_bars <= 16 else 13
    content = {"bars": bars, "colors": colors, "font": font_path(font), "size_px": size_px}
    return Plan("chart", background, content=content)


def plan_digits(
    rng: Random, digits: dict[int, np.ndarray], span: tuple[float, float], *, held_out: bool
) -> Plan:
    """Plan a handwritten number of one to three digits.

    Args:
        rng: Random source.
        digits: digit -> uint8 [n, 28, 28].
        span: Which part of each digit's pictures may be used, as fractions.
        held_out: Take the background hues of the bench.
    """
    length = rng.randint(1, 3)
    low = 10 ** (length - 1) if length > 1 else 0
    text = str(rng.randrange(low, 10**length))
    pictures, indices = [], []
    for character in text:
        stock = digits[int(character)]
        index = rng.randrange(int(span[0] * len(stock)), int(span[1] * len(stock)))
        indices.append(index)
        pictures.append(stock[index].tobytes())
    size_px = rng.randint(64, 84) if length == 3 else rng.randint(76, 104)
    width = round(size_px * (1 + 0.78 * (length - 1)))
    content = {
        "text": text,
        "pictures": pictures,
        "indices": indices,
        "size_px": size_px,
        "left_px": rng.randint(2, PICTURE_PX - width - 2),
        "top_px": rng.randint(2, PICTURE_PX - size_px - 2),
        "ink": tuple(rng.randrange(0, 110) for _ in range(3)),
    }
    return Plan("digits", plan_background(rng, held_out=held_out), content=content)


def plan_word(rng: Random, word: str, *, held_out: bool) -> Plan:
    """Plan a printed word; ``held_out`` takes font and background hues of the bench."""
    font = BENCH_FONT if held_out else rng.choice(TRAIN_FONTS)
    content = {
        "text": word,
        "font": font_path(font),
        "size_px": rng.randint(38, 60),
        "ink": tuple(rng.randrange(0, 110) for _ in range(3)),
        "across": rng.random(),
        "down": rng.random(),
    }
    return Plan("word", plan_background(rng, held_out=held_out), content=content)


def digits_items(rng: Random, ledger: Ledger, plan: Plan) -> list[Item]:
    """Ask for the number, as a lettered question and freely, and for how many digits it has."""
    text = plan.content["text"]
    item = Item("digits", NUMBER_QUESTION, text)
    low = 10 ** (len(text) - 1) if len(text) > 1 else 0
    others = [str(number) for number in range(low, 10 ** len(text)) if str(number) != text]
    # two of the wrong numbers differ in one digit only, so that every digit must be read
    near = [each for each in others if sum(a != b for a, b in zip(each, text, strict=True)) == 1]
    wrong = list(dict.fromkeys(rng.sample(near, 2) + rng.sample(others, 3)))[:3]
    return [item, ledger.lettered(rng, item, wrong)]


def word_items(rng: Random, ledger: Ledger, plan: Plan, words: list[str]) -> list[Item]:
    """Ask for the word, freely, with letters and by yes or no; others are of a similar length."""
    text = plan.content["text"]
    item = Item("words", WORD_QUESTION, text)
    near = [word for word in words if word != text and abs(len(word) - len(text)) <= 1]
    wrong = rng.sample(near, 3)
    yes = ledger.say_yes(rng, "word")
    asked = IS_WORD_QUESTION.format(word=text if yes else rng.choice(near))
    return [item, ledger.lettered(rng, item, wrong), Item("words", asked, "yes" if yes else "no")]


def short_words(concepts: dict[str, Concept]) -> list[str]:
    """Return the names that fit on a picture as one word, each with enough of similar length."""
    words = [name for name in concepts if name.isalpha() and len(name) <= 9]
    return [
        word
        for word in words
        if sum(abs(len(word) - len(other)) <= 1 for other in words if other != word) >= 3
    ]


def bar_item(rng: Random, ledger: Ledger, plan: Plan, word: str, *, lettered: bool) -> Item:
    """Ask for the "highest" or the "lowest" bar of a chart."""
    bars = plan.content["bars"]
    label = (max if word == "highest" else min)(bars, key=lambda bar: bar[1])[0]
    item = Item("charts", f"Which bar is the {word}?", label)
    if not lettered:
        return item
    return ledger.lettered(rng, item, [other for other, _ in bars if other != label])


def chart_items(rng: Random, ledger: Ledger, plan: Plan) -> list[Item]:
    """Ask for the highest and the lowest bar, often with letters, and how many bars there are."""
    n_bars = len(plan.content["bars"])
    items = [
        bar_item(rng, ledger, plan, word, lettered=n_bars == N_BARS and rng.random() < 0.6)
        for word in ("highest", "lowest")
    ]
    rng.shuffle(items)
    return [*items, Item("charts", BARS_QUESTION, str(n_bars))]


def _by_year(column: str, rows: list[dict]) -> list[list[tuple[str, float]]]:
    years = sorted({row["year"] for row in rows})
    return [
        [
            (row["country"], float(row[column]))
            for row in rows
            if row["year"] == year and len(row["country"]) <= 6 and row.get(column)
        ]
        for year in years
    ]


def _obesity(rows: list[dict]) -> list[list[tuple[str, float]]]:
    return [[(row["state"], float(row["rate"])) for row in rows]]


def _budget(rows: list[dict]) -> list[list[tuple[str, float]]]:
    totals: dict[str, dict[str, float]] = {}
    for row in rows:
        sums = totals.setdefault(row["Source category name"], {})
        for key, value in row.items():
            if key.isdigit() and int(key) % 5 == 0:
                number = float(str(value).replace(",", "") or 0)
                sums[key] = sums.get(key, 0.0) + number
    return [sorted(sums.items()) for _, sums in sorted(totals.items()) if sums]


def _penguins(rows: list[dict]) -> list[list[tuple[str, float]]]:
    series = []
    for group in ("Species", "Island"):
        for column in ("Beak Length (mm)", "Beak Depth (mm)", "Body Mass (g)"):
            for sex in ("MALE", "FEMALE"):
                values: dict[str, list[float]] = {}
                for row in rows:
                    if row["Sex"] == sex and row[column] is not None:
                        values.setdefault(row[group][:6], []).append(float(row[column]))
                series.append([(name, sum(each) / len(each)) for name, each in values.items()])
    return series


def _wheat(rows: list[dict]) -> list[list[tuple[str, float]]]:
    return [
        [(str(row["year"]), float(row[column])) for row in rows if row.get(column)]
        for column in ("wheat", "wages")
    ]


_READERS: dict[str, Callable[[list[dict]], list[list[tuple[str, float]]]]] = {
    "gapminder": partial(_by_year, "fertility"), "countries": partial(_by_year, "life_expect"),
    "obesity": _obesity, "budget": _budget, "penguins": _penguins, "wheat": _wheat,
}  # fmt: skip
