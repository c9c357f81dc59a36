"""Painting of plans: the same plan gives the same pixels in any process."""

import hashlib
import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from data_prep.sticker_scenes import PICTURE_PX, Plan

NEAR_DUPLICATE_BITS = 6
"""Of the 256 bits of a difference hash."""


def paint(plan: Plan, sprites: dict[str, dict[str, list[bytes]]]) -> Image.Image:
    """Paint a plan.

    Args:
        plan: What to show.
        sprites: style -> concept -> PNG files.

    Returns:
        RGB picture of ``PICTURE_PX`` a side.
    """
    image = _paint_background(plan.background)
    for item in plan.objects:
        with Image.open(io.BytesIO(sprites[item.style][item.name][item.variant])) as sprite:
            x0, y0, x1, y1 = (round(PICTURE_PX * edge) for edge in item.box)
            cut_out = sprite.resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.BILINEAR)
        if item.flip:
            cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if item.variation is not None:
            cut_out = vary(cut_out, Random(item.variation))
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

    A few artists do not show how differently others draw; this widens what they show.

    Args:
        cut_out: RGBA picture.
        rng: Decides everything.

    Returns:
        RGBA picture of the same size.
    """
    alpha, colours = cut_out.getchannel("A"), cut_out.convert("RGB")
    if rng.random() < 0.7:
        hue, saturation, value = colours.convert("HSV").split()
        turn = rng.randint(-30, 30)  # of 256
        hue = hue.point(lambda at: (at + turn) % 256)
        colours = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    colours = ImageEnhance.Color(colours).enhance(rng.uniform(0.2, 1.4))
    colours = ImageEnhance.Contrast(colours).enhance(rng.uniform(0.6, 1.4))
    colours = ImageEnhance.Brightness(colours).enhance(rng.uniform(0.7, 1.25))
    if rng.random() < 0.2:
        colours = colours.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    colours.putalpha(alpha)
    slant = rng.uniform(-0.2, 0.2)
    affine = (1, slant, -slant * cut_out.height / 2, 0, 1, 0)
    slanted = colours.transform(
        cut_out.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    return slanted.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR)


def _paint_background(background: dict[str, Any]) -> Image.Image:
    first, second = (np.array(colour, dtype=np.float32) for colour in background["colours"])
    side = PICTURE_PX
    if background["kind"] == "plain":
        return Image.new("RGB", (side, side), background["colours"][0])
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
        grey = Image.frombytes("L", (28, 28), digit)
        mask = grey.resize(ink.size, Image.Resampling.BICUBIC)
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
        colour = tuple(content["colours"][index])
        draw.rectangle((x0, bottom - height, x0 + slot * 0.64, bottom - 1), fill=colour)
        draw.text((x0 + slot * 0.32, bottom + 6), label, font=font, fill=(30, 30, 30), anchor="ma")


def encode_png(image: Image.Image) -> bytes:
    """Return the picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def difference_hash(image: Image.Image) -> int:
    """Return a 256-bit hash that is nearly the same for nearly the same pictures.

    Each bit tells whether a cell of a 17 x 16 grey thumbnail is brighter than its right neighbour.
    """
    small = image.convert("L").resize((17, 16), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.int16)  # [16, 17]
    bits = grey[:, 1:] > grey[:, :-1]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def paint_to_file(
    plan: Plan, sprites: dict[str, dict[str, list[bytes]]], path: Path
) -> tuple[str, int]:
    """Paint a plan into a PNG file.

    Returns:
        SHA-256 of the file and the picture's difference hash.
    """
    image = paint(plan, sprites)
    data = encode_png(image)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest(), difference_hash(image)


def is_near_duplicate(picture_hash: int, others: Iterable[int]) -> bool:
    """Tell whether a difference hash is within ``NEAR_DUPLICATE_BITS`` of any other."""
    return any((picture_hash ^ other).bit_count() <= NEAR_DUPLICATE_BITS for other in others)
