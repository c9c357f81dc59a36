"""A tiny catalogue of shapes drawn in code, for when no source can be reached."""

import io
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_prep.sticker.names import Concept
from data_prep.sticker.sources import PHOTO_STYLE, Catalogue

_SIDE_PX = 96
_STYLES = ("flat", "outlined")
_BENCH_STYLE = "shaded"
_N_DIGITS = 20


def _regular(corners: int, turn: float = -90.0, inner: float = 1.0) -> list[tuple[float, float]]:
    points = []
    for index in range(corners):
        angle = math.radians(turn + 360 * index / corners)
        radius = 0.5 * (inner if index % 2 else 1.0)
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


_SHAPES: dict[str, tuple[str, Sequence[tuple[float, float]]]] = {
    "triangle": ("shape-cornered", _regular(3)),
    "square": ("shape-cornered", _regular(4, 45)),
    "diamond": ("shape-cornered", [(0.5, 0), (0.82, 0.5), (0.5, 1), (0.18, 0.5)]),
    "pentagon": ("shape-cornered", _regular(5)),
    "hexagon": ("shape-cornered", _regular(6)),
    "octagon": ("shape-cornered", _regular(8, 22.5)),
    "trapezoid": ("shape-cornered", [(0.25, 0.2), (0.75, 0.2), (1, 0.8), (0, 0.8)]),
    "circle": ("shape-round", _regular(48)),
    "star": ("sign-pointed", _regular(10, -90, 0.42)),
    "burst": ("sign-pointed", _regular(24, -90, 0.62)),
    "arrow": ("sign-pointed", [(0, 0.35), (0.55, 0.35), (0.55, 0.1), (1, 0.5), (0.55, 0.9),
                               (0.55, 0.65), (0, 0.65)]),
    "cross": ("sign-crossed", [(0.35, 0), (0.65, 0), (0.65, 0.35), (1, 0.35), (1, 0.65),
                               (0.65, 0.65), (0.65, 1), (0.35, 1), (0.35, 0.65), (0, 0.65),
                               (0, 0.35), (0.35, 0.35)]),
    "chevron": ("sign-crossed", [(0, 0), (0.6, 0), (1, 0.5), (0.6, 1), (0, 1), (0.4, 0.5)]),
    "house": ("sign-crossed", [(0.5, 0), (1, 0.45), (0.85, 0.45), (0.85, 1), (0.15, 1),
                               (0.15, 0.45), (0, 0.45)]),
}  # fmt: skip


def drawn_catalogue() -> Catalogue:
    """Return 14 shapes in two train styles, one held-out style and one grainy "photo" style.

    The digits are the figures of a built-in bitmap font, distorted; the tables are made up.
    """
    concepts = [
        Concept(name, subgroup, frozenset(), name) for name, (subgroup, _) in _SHAPES.items()
    ]
    sprites: dict[str, dict[str, list[bytes]]] = defaultdict(dict)
    for index, (name, (_, points)) in enumerate(_SHAPES.items()):
        for style in (*_STYLES, _BENCH_STYLE, PHOTO_STYLE):
            sprites[style][name] = [_draw(points, style, index)]
    return Catalogue(
        concepts=concepts,
        sprites=dict(sprites),
        train_styles=_STYLES,
        bench_styles=(_BENCH_STYLE, PHOTO_STYLE),
        digits=_drawn_digits(),
        tables=_made_up_tables(),
    )


def _draw(points: Sequence[tuple[float, float]], style: str, index: int) -> bytes:
    side = _SIDE_PX
    rng = np.random.default_rng([index, sum(style.encode())])
    color = tuple(int(value) for value in rng.integers(20, 200, 3))
    corners = [(4 + x * (side - 8), 4 + y * (side - 8)) for x, y in points]
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)
    if style == "outlined":
        draw.polygon(corners, fill=(255, 255, 255, 255))
        draw.line([*corners, corners[0], corners[1]], fill=(*color, 255), width=6, joint="curve")
    else:
        draw.polygon(corners, fill=(*color, 255))
    if style == _BENCH_STYLE:
        light = np.linspace(70, -50, side)[:, None, None]  # [side, 1, 1]
        image = _add_light(image, light)
    elif style == PHOTO_STYLE:
        grain = rng.normal(0, 14, (side, side, 1))
        image = _add_light(image, grain).filter(ImageFilter.GaussianBlur(0.7))
    image = image.crop(image.getchannel("A").getbbox())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _add_light(image: Image.Image, light: np.ndarray) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)  # [side, side, 4]
    pixels[..., :3] = np.clip(pixels[..., :3] + light, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _drawn_digits() -> dict[int, np.ndarray]:
    digits = {}
    for digit in range(10):
        rng = np.random.default_rng(digit)
        pictures = []
        for _ in range(_N_DIGITS):
            small = Image.new("L", (14, 14))
            ImageDraw.Draw(small).text((4, 1), str(digit), fill=255)
            big = small.resize((28, 28), Image.Resampling.BICUBIC)
            shift = rng.uniform(-2, 2, 2)
            skew = rng.uniform(-0.25, 0.25)
            turned = big.transform(
                (28, 28), Image.Transform.AFFINE, (1, skew, shift[0] - 14 * skew, 0, 1, shift[1]),
                Image.Resampling.BILINEAR,
            )  # fmt: skip
            pictures.append(np.asarray(turned))
        digits[digit] = np.stack(pictures)
    return digits


def _made_up_tables() -> dict[str, list[dict]]:
    years = range(1600, 1660, 5)
    return {
        "obesity": [
            {"state": f"{first}{second}", "rate": 0.1 + 0.07 * index}
            for index, (first, second) in enumerate(zip("ABCDEFGH", "KLMNOPQR", strict=True))
        ],
        "wheat": [
            {"year": str(year), "wheat": 20 + 9 * index, "wages": 5 + 2 * index}
            for index, year in enumerate(years)
        ],
    }
