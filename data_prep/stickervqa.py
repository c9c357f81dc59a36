"""Build StickerVQA: pictures with exact answers, from package registries alone.

    python data_prep/stickervqa.py --size core --seed 0 --out DIR

Writes a train and a validation split as LLaVA JSON, and benches on held-out artists, photos,
combinations, digits, fonts, chart tables and background colors in the file formats of MMBench,
POPE and VQA v2. Scores on them are StickerVQA scores, not scores of those benchmarks.
"""

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from tqdm import tqdm

from data_prep.sticker.build import SIZES, VERSION, Builder
from data_prep.sticker.fallback import drawn_catalogue
from data_prep.sticker.sources import SOURCES, Catalogue, fetch_sources, load_catalogue
from milora_vl.data.fetch import FetchError, MissingPackageError, need_packages
from milora_vl.files import replace_folder

logger = logging.getLogger(__name__)


def build_stickervqa(
    out: Path | str,
    size: str = "core",
    seed: int = 0,
    *,
    n_train_pictures: int | None = None,
    allow_fetch: bool = True,
    catalogue: Catalogue | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Build the set into a folder, whole or not at all.

    Args:
        out: Final folder; one already there is replaced when the new one is complete.
        size: A key of ``SIZES``.
        seed: Decides everything that is drawn by chance.
        n_train_pictures: Records in train, instead of the size's own number.
        allow_fetch: False: do not ask any registry, use the set drawn in code.
        catalogue: From ``find_catalogue``, to build several sets from one; else it is called.
        show_progress: Show a bar while painting.

    Returns:
        The manifest.

    Raises:
        ValueError: If the size is unknown or a number is not positive.
        ChecksumError: If a downloaded file is not the pinned one.
        RuntimeError: If a bench picture nearly equals a train picture.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose from {', '.join(SIZES)}")
    sizes = SIZES[size]
    n_train = sizes.n_train if n_train_pictures is None else n_train_pictures
    if n_train < 1:
        raise ValueError(f"{n_train} train pictures wanted; at least 1 is needed")
    if catalogue is None:
        catalogue = find_catalogue(size, allow_fetch=allow_fetch, show_progress=show_progress)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # beside the final folder, so that the last step is one rename
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        builder = Builder(temporary, catalogue, sizes, seed, show_progress)
        manifest = builder.build(n_train, size)
        # mkdtemp makes folders that nobody else can read
        temporary.chmod(0o755)
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def find_catalogue(size: str, *, allow_fetch: bool, show_progress: bool = False) -> Catalogue:
    """Return the real catalogue, or the one drawn in code where the real one cannot be had.

    Args:
        size: A key of ``SIZES``.
        allow_fetch: False: ask no registry and draw.
        show_progress: Show bars while fetching and rendering.

    Raises:
        ChecksumError: If a downloaded file is not the pinned one.
        milora_vl.data.fetch.MissingPackageError: If the extra "demo" is not installed.
    """
    if not allow_fetch:
        return drawn_catalogue()
    need_packages("StickerVQA's pictures", "resvg_py")

    bar = partial(tqdm, disable=not show_progress)
    files, left_out = fetch_sources(bar(SOURCES, "StickerVQA sources", unit="source"))
    track = partial(bar, desc="StickerVQA drawings", unit="concept")
    catalogue = load_catalogue("full" if size == "full" else "core", files, left_out, track)
    if catalogue is not None:
        return catalogue
    logger.warning("no named drawings are available: using the small set drawn in code")
    return replace(drawn_catalogue(), left_out=left_out)


def is_built(out: Path, size: str, seed: int) -> bool:
    """Say whether the folder holds this version of the set, made from all sources there are now.

    Sources that an earlier build had to skip are tried again.
    """
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = {"version": VERSION, "size": size, "seed": seed, "drawn_in_code": False}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        return False
    names = {each["name"] for each in manifest["left_out"]}
    found, _ = fetch_sources([source for source in SOURCES if source.name in names])
    return not found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to build (replaced)")
    parser.add_argument("--scenes", type=int, help="train records, instead of the size's number")
    parser.add_argument("--no-fetch", action="store_true", help="use the set drawn in code")
    parser.add_argument("--if-needed", action="store_true", help="keep the same set if it is there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.if_needed and is_built(options.out, options.size, options.seed):
        logger.info("StickerVQA is built: %s", options.out)
        return 0
    # a plain kill would skip the clean-up of the unfinished folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        manifest = build_stickervqa(
            options.out, options.size, options.seed,
            n_train_pictures=options.scenes, allow_fetch=not options.no_fetch,
        )  # fmt: skip
    except (FetchError, MissingPackageError, ValueError, OSError) as error:
        logger.error("StickerVQA was not built: %s", error)
        return 1
    logger.info("%s", json.dumps(manifest["counts"], indent=1))
    logger.info("built in %s", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
