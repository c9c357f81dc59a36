"""Plan pictures (backgrounds, places for cut-outs) and paint the plans.

A plan is plain data, made in one process from one random source. Painting is a pure function of
the plan and the cut-outs, so any process paints the same pixels.
"""

import colorsys
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

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
        variation: Seed of a change of colors, slant and sharpness; None paints it as it is.
    """

    name: str
    style: str
    variant: int
    box: Box
    flip: bool = False
    variation: int | None = None

    @property
    def center(self) -> tuple[float, float]:
        """Return the center of the box, as fractions."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Plan:
    """All that is needed to paint one picture and to ask about it.

    Attributes:
        kind: "scene", "drawing", "digits", "word" or "chart".
        background: Colors and texture, from ``plan_background``.
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
    """Choose a light background, in the hues kept for the bench or in all others."""

    def hue() -> float:
        while True:
            value = rng.random()
            if any(low <= value < high for low, high in BENCH_HUES) == held_out:
                return value

    def color() -> tuple[int, int, int]:
        red, green, blue = colorsys.hsv_to_rgb(
            hue(), rng.uniform(0.06, 0.38), rng.uniform(0.86, 1.0)
        )
        return round(255 * red), round(255 * green), round(255 * blue)

    first = color()
    return {
        "kind": rng.choice(("plain", "gradient", "soft")),
        "colors": (first, color()),
        "angle": rng.randrange(4),
        "noise_seed": rng.randrange(1 << 30),
    }


def place(rng: Random, wanted: list[Wanted]) -> tuple[Placed, ...]:
    """Find places inside the picture for all cut-outs, in their order.

    Two boxes overlap by less than 8 % of the smaller one.
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
        # ever smaller until all fit, but not so small that they could not be told apart
        shrink = max(0.5, shrink * 0.97)


def place_pair(rng: Random, wanted: list[Wanted], relation: str) -> tuple[Placed, ...]:
    """Place the first cut-out in a clear relation, as seen from the second, and others anywhere."""
    while True:
        placed = place(rng, wanted)
        if relation_of(placed[0], placed[1]) == relation:
            return placed


def relation_of(one: Placed, other: Placed) -> str | None:
    """Return where ``one`` is as seen from ``other``, or None where it is not clear-cut.

    Clear-cut: the centers are at least 0.30 of the side apart along one axis and at most 0.14
    along the other.
    """
    across, down = (a - b for a, b in zip(one.center, other.center, strict=True))
    if abs(across) >= _MIN_GAP_RATIO and abs(down) <= _MAX_OFF_AXIS_RATIO:
        return "left" if across < 0 else "right"
    if abs(down) >= _MIN_GAP_RATIO and abs(across) <= _MAX_OFF_AXIS_RATIO:
        return "above" if down < 0 else "below"
    return None


def extent(aspect: float, side: float) -> tuple[float, float]:
    """Return width and height of a cut-out whose longer side is ``side``."""
    return (side, side / aspect) if aspect >= 1 else (side * aspect, side)


def _box_at(rng: Random, aspect: float, side: float) -> Box:
    width, height = extent(aspect, side)
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


NEAR_DUPLICATE_BITS = 6
"""Of the 256 bits of a difference hash."""


def paint(plan: Plan, sprites: dict[str, dict[str, list[bytes]]]) -> Image.Image:
    """Paint a plan as an RGB picture, ``PICTURE_PX`` a side, from PNG files by style and name."""
    image = _paint_background(plan.background)
    for item in plan.objects:
        with Image.open(io.BytesIO(sprites[item.style][item.name][item.variant])) as sprite:
            x0, y0, x1, y1 = (round(PICTURE_PX * edge) for edge in item.box)
            cut_out = sprite.resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.BILINEAR)
        if item.flip:
            cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if item.variation is not None:
            cut_out = vary(cut_out, Random(item.variation))
        # its own alpha is the mask
        image.paste(cut_out, (x0, y0), cut_out)
    if plan.kind == "digits":
        _paint_digits(image, plan.content)
    elif plan.kind == "word":
        _paint_word(image, plan.content)
    elif plan.kind == "chart":
        _paint_chart(image, plan.content)
    return image


def vary(cut_out: Image.Image, rng: Random) -> Image.Image:
    """Change hue, saturation, contrast, brightness, slant, angle and sometimes sharpness.

    A few artists do not show how differently others draw; this widens what they show. The cut-out
    and what is returned are RGBA pictures of one size.
    """
    alpha, colors = cut_out.getchannel("A"), cut_out.convert("RGB")
    if rng.random() < 0.7:
        hue, saturation, value = colors.convert("HSV").split()
        turn = rng.randint(-30, 30)  # of 256
        hue = hue.point(lambda at: (at + turn) % 256)
        colors = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    colors = ImageEnhance.Color(colors).enhance(rng.uniform(0.2, 1.4))
    colors = ImageEnhance.Contrast(colors).enhance(rng.uniform(0.6, 1.4))
    colors = ImageEnhance.Brightness(colors).enhance(rng.uniform(0.7, 1.25))
    if rng.random() < 0.2:
        colors = colors.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    colors.putalpha(alpha)
    slant = rng.uniform(-0.2, 0.2)
    affine = (1, slant, -slant * cut_out.height / 2, 0, 1, 0)
    slanted = colors.transform(
        cut_out.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    return slanted.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR)


def _paint_background(background: dict[str, Any]) -> Image.Image:
    first, second = (np.array(color, dtype=np.float32) for color in background["colors"])
    side = PICTURE_PX
    if background["kind"] == "plain":
        return Image.new("RGB", (side, side), background["colors"][0])
    if background["kind"] == "gradient":
        ramp = np.linspace(0, 1, side, dtype=np.float32)
        weight = np.rot90(np.tile(ramp, (side, 1)), background["angle"])
    else:
        noise = np.random.default_rng(background["noise_seed"]).integers(0, 256, (6, 6), np.uint8)
        soft = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        weight = np.asarray(soft, dtype=np.float32) / 255
    pixels = first + (second - first) * weight[..., None]  # [side, side, 3]
    return Image.fromarray(pixels.round().astype(np.uint8))


def _paint_digits(image: Image.Image, content: dict[str, Any]) -> None:
    ink = Image.new("RGB", (content["size_px"],) * 2, tuple(content["ink"]))
    for index, digit in enumerate(content["pictures"]):
        gray = Image.frombytes("L", (28, 28), digit)
        mask = gray.resize(ink.size, Image.Resampling.BICUBIC)
        x0 = content["left_px"] + round(index * content["size_px"] * 0.78)
        image.paste(ink, (x0, content["top_px"]), mask)


@lru_cache(maxsize=64)
def load_font(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Return a font file at a size."""
    return ImageFont.truetype(path, size_px)


def _paint_word(image: Image.Image, content: dict[str, Any]) -> None:
    draw = ImageDraw.Draw(image)
    size_px = content["size_px"]
    while True:
        font = load_font(content["font"], size_px)
        x0, y0, x1, y1 = draw.textbbox((0, 0), content["text"], font=font)
        # a long word is printed smaller
        if x1 - x0 <= PICTURE_PX - 12:
            break
        size_px -= 2
    free_x, free_y = PICTURE_PX - 8 - (x1 - x0), PICTURE_PX - 8 - (y1 - y0)
    at = (4 - x0 + free_x * content["across"], 4 - y0 + free_y * content["down"])
    draw.text(at, content["text"], font=font, fill=tuple(content["ink"]))


def _paint_chart(image: Image.Image, content: dict[str, Any]) -> None:
    draw = ImageDraw.Draw(image)
    font = load_font(content["font"], content["size_px"])
    left, top, right, bottom = 10, 14, PICTURE_PX - 10, PICTURE_PX - 30
    slot = (right - left) / len(content["bars"])
    highest = max(value for _, value in content["bars"])
    draw.line((left, bottom, right, bottom), fill=(60, 60, 60), width=2)
    for index, (label, value) in enumerate(content["bars"]):
        x0 = left + index * slot + slot * 0.18
        height = (bottom - top) * value / highest
        color = tuple(content["colors"][index])
        draw.rectangle((x0, bottom - height, x0 + slot * 0.64, bottom - 1), fill=color)
        draw.text((x0 + slot * 0.32, bottom + 6), label, font=font, fill=(30, 30, 30), anchor="ma")


def encode_png(image: Image.Image) -> bytes:
    """Return the picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def difference_hash(image: Image.Image) -> int:
    """Return a 256-bit hash that is nearly the same for nearly the same pictures.

    Each bit tells whether a cell of a 17 x 16 gray thumbnail is brighter than its right neighbour.
    """
    # one column more than bits in a row: each bit compares two neighbors
    small = image.convert("L").resize((17, 16), Image.Resampling.BOX)
    gray = np.asarray(small, dtype=np.int16)  # [16, 17]
    bits = gray[:, 1:] > gray[:, :-1]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def paint_to_file(
    plan: Plan, sprites: dict[str, dict[str, list[bytes]]], path: Path
) -> tuple[str, int]:
    """Paint a plan into a PNG file. Returns its SHA-256 and the picture's difference hash."""
    image = paint(plan, sprites)
    data = encode_png(image)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest(), difference_hash(image)


def is_near_duplicate(picture_hash: int, others: Iterable[int]) -> bool:
    """Tell whether a difference hash is within ``NEAR_DUPLICATE_BITS`` of any other."""
    return any((picture_hash ^ other).bit_count() <= NEAR_DUPLICATE_BITS for other in others)
