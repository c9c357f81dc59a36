"""Benches in their official layout: count their questions, look at every image, write a manifest.

The evaluation reads the official files themselves, so nothing is converted. What is checked here is
what would otherwise be found out in the middle of an evaluation.
"""

import argparse
import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from milora_vl.data.images import read_image_size
from milora_vl.errors import MiloraError
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.items import Item
from milora_vl.files import write_json_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfficialBench:
    """One bench.

    Attributes:
        name: In ``BENCHES``.
        counts: Numbers of questions that published versions of its files have.
        note: Where the files are to be had, and what differs between versions.
    """

    name: str
    counts: tuple[int, ...]
    note: str = ""


def check(bench: OfficialBench, raw: Path) -> dict[str, Any]:
    """Return the manifest of a bench's files.

    Raises:
        MiloraError: If a row is malformed; the message names file and row.
        OSError: If a file is missing.
    """
    items = BENCHES[bench.name].load(raw)
    problems = []
    for item in tqdm(items, f"{bench.name} images", unit="image"):
        problem = _look_at(item)
        if problem:
            problems.append({"id": item.id, "problem": problem})
    return {
        "name": bench.name,
        "questions": len(items),
        "published": list(bench.counts),
        "categories": dict(sorted(Counter(item.category for item in items).items())),
        "without_label": sum(not item.answers for item in items),
        "problems": problems,
        "data_dir": str(raw.resolve()),
        "note": bench.note,
    }


def _look_at(item: Item) -> str | None:
    for source in (item.image, *item.more_images):
        try:
            if source is not None:
                read_image_size(io.BytesIO(source.read()))
        except (ValueError, OSError) as error:
            return str(error)
    return None


def run(bench: OfficialBench, layout: str, arguments: Sequence[str] | None = None) -> int:
    """Run a bench's command line; returns the exit code: 0, 1 for problems, 2 if unreadable."""
    parser = argparse.ArgumentParser(
        description=f"{layout.strip()}\n\n{bench.note}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--raw", type=Path, required=True, help="folder in the official layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifest")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        manifest = check(bench, options.raw)
    except (MiloraError, OSError) as error:
        logger.error("%s cannot be used: %s", bench.name, error)
        return 2
    write_json_atomic(options.out / "manifest.json", manifest)
    known = " or ".join(map(str, bench.counts))
    logger.info("%s: %d questions, published %s", bench.name, manifest["questions"], known)
    if manifest["without_label"]:
        logger.info("  without a label: %d", manifest["without_label"])
    for problem in manifest["problems"][:10]:
        logger.warning("  %s: %s", problem["id"], problem["problem"])
    if manifest["problems"]:
        logger.warning("  %d problems, all in manifest.json", len(manifest["problems"]))
    return 1 if manifest["problems"] else 0
