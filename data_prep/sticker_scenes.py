"""Planning of pictures: backgrounds and places for cut-outs.

A plan is plain data, made in one process from one random source; painting a plan is a pure
function of the plan and the cut-outs, so it can run in any process and gives the same pixels.
"""

import colorsys
from dataclasses import dataclass, field
from random import Random
from typing import Any

PICTURE_PX = 224
BENCH_HUES = ((0.11, 0.19), (0.44, 0.53), (0.78, 0.86))
"""Background hues (0-1) that only the bench uses: yellow, cyan, violet."""

_SIDE_RATIOS = {1: (0.42, 0.62), 2: (0.36, 0.50), 3: (0.32, 0.44), 4: (0.30, 0.40)}
_SMALL_SIDE_RATIO = (0.19, 0.29)
_MARGIN_RATIO = 0.015
_MAX_OVERLAP_RATIO = 0.08
_MIN_GAP_RATIO = 0.30
_MAX_OFF_AXIS_RATIO = 0.14

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Placed:
    """One cut-out in a picture.

    Attributes:
        name: Concept.
        style: Artist or medium.
        variant: Which of the style's cut-outs of the concept.
        box: x0, y0, x1, y1 as fractions of the side.
        flip: Mirrored left to right.
        variation: Seed of a change of colours, slant and sharpness; None paints it as it is.
    """

    name: str
    style: str
    variant: int
    box: Box
    flip: bool = False
    variation: int | None = None

    @property
    def centre(self) -> tuple[float, float]:
        """Return the centre of the box, as fractions."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Plan:
    """All that is needed to paint one picture and to ask about it.

    Attributes:
        kind: "scene", "drawing", "digits", "word" or "chart".
        background: Colours and texture, from ``plan_background``.
        objects: Cut-outs, back to front.
        content: What digits, words and charts show.
    """

    kind: str
    background: dict[str, Any]
    objects: tuple[Placed, ...] = ()
    content: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """A cut-out that has no place yet; ``aspect`` is width / height."""

    name: str
    style: str
    variant: int
    aspect: float


def plan_background(rng: Random, *, held_out: bool) -> dict[str, Any]:
    """Choose a light background: plain, a gradient or a soft texture.

    Args:
        rng: Random source.
        held_out: Use the hues kept for the bench, instead of all others.
    """

    def hue() -> float:
        while True:
            value = rng.random()
            if any(low <= value < high for low, high in BENCH_HUES) == held_out:
                return value

    def colour() -> tuple[int, int, int]:
        red, green, blue = colorsys.hsv_to_rgb(
            hue(), rng.uniform(0.06, 0.38), rng.uniform(0.86, 1.0)
        )
        return round(255 * red), round(255 * green), round(255 * blue)

    first = colour()
    return {
        "kind": rng.choice(("plain", "gradient", "soft")),
        "colours": (first, colour()),
        "angle": rng.randrange(4),
        "noise_seed": rng.randrange(1 << 30),
    }


def place(rng: Random, wanted: list[Wanted]) -> tuple[Placed, ...]:
    """Find places with little overlap for all cut-outs.

    Args:
        rng: Random source.
        wanted: One entry a cut-out.

    Returns:
        The cut-outs in the given order, boxes inside the picture, overlapping by less than 8 % of
        the smaller box.
    """
    low, high = _SIDE_RATIOS.get(len(wanted), _SMALL_SIDE_RATIO)
    shrink = 1.0
    while True:
        boxes: list[Box] = []
        for item in wanted:
            for _ in range(60):
                side = rng.uniform(low, high) * shrink
                box = _box_at(rng, item.aspect, side)
                if all(_overlap_ratio(box, other) < _MAX_OVERLAP_RATIO for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(wanted):
            return tuple(
                Placed(item.name, item.style, item.variant, box, rng.random() < 0.5)
                for item, box in zip(wanted, boxes, strict=True)
            )
        shrink = max(0.5, shrink * 0.97)


def place_pair(rng: Random, wanted: list[Wanted], relation: str) -> tuple[Placed, ...]:
    """Place the first cut-out in a clear relation to the second, and others anywhere.

    Args:
        rng: Random source.
        wanted: At least two.
        relation: "left", "right", "above" or "below": of the first as seen from the second.
    """
    while True:
        placed = place(rng, wanted)
        if relation_of(placed[0], placed[1]) == relation:
            return placed


def relation_of(one: Placed, other: Placed) -> str | None:
    """Return where ``one`` is as seen from ``other``, or None where it is not clear-cut.

    Clear-cut: the centres are at least 0.30 of the side apart along one axis and at most 0.14
    along the other.
    """
    across, down = (a - b for a, b in zip(one.centre, other.centre, strict=True))
    if abs(across) >= _MIN_GAP_RATIO and abs(down) <= _MAX_OFF_AXIS_RATIO:
        return "left" if across < 0 else "right"
    if abs(down) >= _MIN_GAP_RATIO and abs(across) <= _MAX_OFF_AXIS_RATIO:
        return "above" if down < 0 else "below"
    return None


def _box_at(rng: Random, aspect: float, side: float) -> Box:
    width, height = (side, side / aspect) if aspect >= 1 else (side * aspect, side)
    x0 = rng.uniform(_MARGIN_RATIO, 1 - _MARGIN_RATIO - width)
    y0 = rng.uniform(_MARGIN_RATIO, 1 - _MARGIN_RATIO - height)
    return x0, y0, x0 + width, y0 + height


def _overlap_ratio(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    if across <= 0 or down <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return across * down / min(areas)
