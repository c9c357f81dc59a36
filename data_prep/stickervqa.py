"""Build StickerVQA: pictures with exact answers, from package registries alone.

    python data_prep/stickervqa.py --size core --seed 0 --out DIR

Writes a train and a validation split as LLaVA JSON, and benches on held-out artists, photos,
combinations, digits, fonts, chart tables and background colours in the file formats of MMBench,
POPE and VQA v2. Scores on them are StickerVQA scores, not scores of those benchmarks.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from tqdm import tqdm

from data_prep.sticker_attribution import attribution_text
from data_prep.sticker_bench_plans import BenchPlanner
from data_prep.sticker_benches import (
    BenchPicture,
    category_counts,
    json_lines,
    letter_counts,
    mmbench_tsv,
    picture_name,
    pope_rows,
    vqa_files,
)
from data_prep.sticker_charts import BENCH_TABLES, TRAIN_TABLES, bar_series
from data_prep.sticker_fallback import drawn_catalogue
from data_prep.sticker_scene_plans import Stage
from data_prep.sticker_scenes import Plan, difference_hash, encode_png, paint, paint_to_file
from data_prep.sticker_sources import Catalogue, fetch_sources, load_catalogue, with_left_out
from data_prep.sticker_train import Split, plan_records
from milora_vl.data.fetch import FetchError
from milora_vl.files import replace_folder, sha256_of, write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

VERSION = 1
TRAIN_DIGITS, VAL_DIGITS, BENCH_DIGITS = (0.0, 0.7), (0.7, 0.8), (0.8, 1.0)
NEAR_DUPLICATE_BITS = 6
N_PROCESSES = 2
_POPE_KINDS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        n_train: Records in train, about 5 % of them without a picture.
        n_val: Records in val.
        max_objects: Most cut-outs in a picture.
        n_mmbench: Base questions of the bench; ``n_val_mmbench`` of validation.
        n_pope: Rows of each POPE file; ``n_val_pope`` of validation.
        n_vqa: Questions of the VQA files.
        n_scenes: Pictures the POPE questions are asked about.
    """

    n_train: int
    n_val: int
    max_objects: int
    n_mmbench: int
    n_val_mmbench: int
    n_pope: int
    n_val_pope: int
    n_vqa: int
    n_scenes: int


SIZES = {
    "core": Sizes(4000, 200, 4, 300, 150, 300, 200, 200, 160),
    "full": Sizes(6000, 400, 8, 1000, 300, 500, 300, 500, 300),
    "tiny": Sizes(60, 12, 4, 24, 12, 24, 12, 20, 24),
}
"""``tiny`` is for tests."""


def build_stickervqa(
    out: Path | str,
    size: str = "core",
    seed: int = 0,
    *,
    n_train_pictures: int | None = None,
    allow_fetch: bool = True,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Build the set into a folder, whole or not at all.

    Args:
        out: Final folder; one already there is replaced when the new one is complete.
        size: A key of ``SIZES``.
        seed: Decides everything that is drawn by chance.
        n_train_pictures: Records in train, instead of the size's own number.
        allow_fetch: False: do not ask any registry, use the set drawn in code.
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
    catalogue = find_catalogue(size, allow_fetch=allow_fetch)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        builder = _Builder(temporary, catalogue, sizes, seed, show_progress)
        manifest = builder.build(n_train, size)
        temporary.chmod(0o755)
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def find_catalogue(size: str, *, allow_fetch: bool) -> Catalogue:
    """Return the real catalogue, or the one drawn in code where the real one cannot be had."""
    if allow_fetch:
        files, left_out = fetch_sources()
        catalogue = load_catalogue("core" if size == "tiny" else size, files)
        if catalogue is not None:
            return with_left_out(catalogue, left_out)
        logger.warning("no drawings with names could be had: using the small set drawn in code")
        return with_left_out(drawn_catalogue(), left_out)
    return drawn_catalogue()


class _Builder:
    """Holds what the steps of one build share."""

    def __init__(
        self, folder: Path, catalogue: Catalogue, sizes: Sizes, seed: int, show_progress: bool
    ) -> None:
        self.folder = folder
        self.catalogue = catalogue
        self.sizes = sizes
        self.seed = seed
        self.show_progress = show_progress
        self.aspects = _aspects(catalogue)
        self.train_hashes: list[int] = []
        self.picture_digests: dict[str, str] = {}
        self.counts: dict[str, Any] = {}

    def build(self, n_train: int, size: str) -> dict[str, Any]:
        for name in ("train", "val", "bench"):
            (self.folder / "images" / name).mkdir(parents=True)
        tables = self.catalogue.tables
        train_styles, bench_styles = self.catalogue.train_styles, self.catalogue.bench_styles
        train = self._split(train_styles, False, TRAIN_DIGITS, bar_series(tables, TRAIN_TABLES))
        val = self._split(train_styles, False, VAL_DIGITS, bar_series(tables, TRAIN_TABLES))
        bench = self._split(bench_styles, True, BENCH_DIGITS, bar_series(tables, BENCH_TABLES))
        self._records("train", train, n_train)
        self._records("val", val, self.sizes.n_val)
        self._benches("val", val, held_out=False)
        self._benches("bench", bench, held_out=True)
        write_text_atomic(self.folder / "ATTRIBUTION.md", attribution_text(self.catalogue))
        manifest = self._manifest(size)
        write_json_atomic(self.folder / "manifest.json", manifest)
        return manifest

    def _split(
        self,
        styles: tuple[str, ...],
        held_out: bool,
        digit_span: tuple[float, float],
        series: list[list[tuple[str, float]]],
    ) -> Split:
        stage = Stage(self.catalogue, self.aspects, styles, self.sizes.max_objects, held_out)
        return Split(stage, digit_span, series)

    def _records(self, name: str, split: Split, n_records: int) -> None:
        records, plans = plan_records(Random(f"{self.seed}/{name}"), split, n_records, name)
        done = _paint_all(plans, self.catalogue, self.folder, self._bar(len(plans), name))
        for path, digest, picture_hash in done:
            self.picture_digests[path] = digest
            if name == "train":
                self.train_hashes.append(picture_hash)
        self.counts[name] = _record_counts(records)
        write_text_atomic(
            self.folder / f"{name}.json", json.dumps(records, ensure_ascii=False, indent=0) + "\n"
        )

    def _benches(self, name: str, split: Split, *, held_out: bool) -> None:
        sizes = self.sizes
        rng = Random(f"{self.seed}/{name}/bench")
        place = self.folder if held_out else self.folder / "val"
        n_mmbench, n_pope = (
            (sizes.n_mmbench, sizes.n_pope) if held_out else (sizes.n_val_mmbench, sizes.n_val_pope)
        )
        n_vqa = sizes.n_vqa if held_out else 0
        bar = self._bar(n_mmbench + sizes.n_scenes + n_vqa, f"{name} questions")
        painter = _Painter(self, keep_off=self.train_hashes if held_out else ())
        planner = BenchPlanner(split, held_out, painter.paint)

        def counted(rows: Any) -> list:
            return [(bar.update(1), row)[1] for row in rows]

        lettered = counted(planner.lettered(rng, n_mmbench))
        write_text_atomic(place / "mmbench.tsv", mmbench_tsv(lettered, name))
        scenes = counted(planner.scenes(rng, sizes.n_scenes))
        self._write(name, scenes)
        pope = {}
        for kind in _POPE_KINDS if held_out else _POPE_KINDS[:1]:
            rows = pope_rows(rng, kind, scenes, split.concepts, n_pope)
            write_text_atomic(place / "pope" / f"{kind}.jsonl", json_lines(rows))
            pope[kind] = dict(sorted(Counter(row["label"] for row in rows).items()))
        counts: dict[str, Any] = {
            "mmbench_base": category_counts(category for _, _, category in lettered),
            "mmbench_letters": letter_counts(lettered),
            "pope": pope,
        }
        if held_out:
            rows = counted(planner.open_questions(rng, scenes, n_vqa))
            self._write(name, [picture for picture, _ in rows])
            questions, annotations = vqa_files(rows)
            write_json_atomic(place / "vqa" / "questions.json", questions)
            write_json_atomic(place / "vqa" / "annotations.json", annotations)
            types = (row["answer_type"] for row in annotations["annotations"])
            counts["vqa"] = category_counts(types)
        bar.close()
        self.counts[f"{name}_benches"] = counts

    def _write(self, name: str, pictures: Sequence[BenchPicture]) -> None:
        for picture in pictures:
            path = f"images/{name}/{picture.file_name}"
            (self.folder / path).write_bytes(picture.png)
            self.picture_digests[path] = hashlib.sha256(picture.png).hexdigest()

    def _bar(self, total: int, text: str) -> tqdm:
        return tqdm(
            total=total, desc=f"StickerVQA {text}", unit="pic", disable=not self.show_progress
        )

    def _manifest(self, size: str) -> dict[str, Any]:
        texts = sorted(
            path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".png"
        )
        pictures = "".join(f"{path} {sha}\n" for path, sha in sorted(self.picture_digests.items()))
        return {
            "name": "StickerVQA",
            "version": VERSION,
            "size": size,
            "seed": self.seed,
            "drawn_in_code": not self.catalogue.used,
            "train_styles": list(self.catalogue.train_styles),
            "held_out_styles": list(self.catalogue.bench_styles),
            "concepts": [concept.name for concept in self.catalogue.concepts],
            "sources": [
                {"name": each.name, "package": each.package, "registry": each.registry,
                 "version": each.version, "sha256": each.sha256, "licence": each.licence}
                for each in self.catalogue.used
            ],
            "left_out": [
                {"name": each.name, "package": each.package, "version": each.version,
                 "means": each.without, "reason": reason}
                for each, reason in self.catalogue.left_out
            ],
            "counts": self.counts,
            "files_sha256": {
                path.relative_to(self.folder).as_posix(): sha256_of(path) for path in texts
            },
            "n_pictures": len(self.picture_digests),
            "pictures_sha256": hashlib.sha256(pictures.encode()).hexdigest(),
        }  # fmt: skip


class _Painter:
    """Paints bench pictures that keep clear of the train pictures."""

    def __init__(self, builder: _Builder, keep_off: Sequence[int]) -> None:
        self.catalogue = builder.catalogue
        self.keep_off = keep_off
        self.number = 0

    def paint(self, make: Callable[[], Plan]) -> BenchPicture:
        for _ in range(50):
            plan = make()
            image = paint(plan, self.catalogue.sprites)
            if not is_near_duplicate(difference_hash(image), self.keep_off):
                break
        else:
            raise RuntimeError(
                "50 bench pictures in a row nearly equal a train picture; use another seed"
            )
        self.number += 1
        styles = sorted({item.style for item in plan.objects}) or [plan.kind]
        return BenchPicture(self.number, plan, encode_png(image), "+".join(styles))


def is_near_duplicate(picture_hash: int, others: Sequence[int]) -> bool:
    """Tell whether a difference hash is within ``NEAR_DUPLICATE_BITS`` of any other."""
    return any((picture_hash ^ other).bit_count() <= NEAR_DUPLICATE_BITS for other in others)


def _aspects(catalogue: Catalogue) -> dict[tuple[str, str, int], float]:
    aspects = {}
    for style, by_name in catalogue.sprites.items():
        for name, files in by_name.items():
            for variant, data in enumerate(files):
                # width and height are the first fields of a PNG file's header
                width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
                aspects[style, name, variant] = width / height
    return aspects


_worker: dict[str, Any] = {}


def _start_worker(sprites: dict[str, dict[str, list[bytes]]], folder: str) -> None:
    _worker.update(sprites=sprites, folder=Path(folder))


def _paint_one(job: tuple[str, Plan]) -> tuple[str, str, int]:
    path, plan = job
    return (path, *paint_to_file(plan, _worker["sprites"], _worker["folder"] / path))


def _paint_all(
    plans: Sequence[tuple[str, Plan]], catalogue: Catalogue, folder: Path, bar: tqdm
) -> list[tuple[str, str, int]]:
    """Paint plans into files with a few processes; returns (path, SHA-256, difference hash)."""
    with bar:
        if len(plans) < 200:
            _start_worker(catalogue.sprites, str(folder))
            return [(bar.update(1), _paint_one(job))[1] for job in plans]
        context = multiprocessing.get_context("spawn" if os.name == "nt" else "fork")
        with context.Pool(N_PROCESSES, _start_worker, (catalogue.sprites, str(folder))) as pool:
            done = []
            for row in pool.imap(_paint_one, plans, chunksize=16):
                done.append(row)
                bar.update(1)
            return done


def _record_counts(records: list[dict]) -> dict[str, Any]:
    answers: Counter = Counter()
    counts: Counter = Counter()
    for record in records:
        turns = record["conversations"]
        for item, answer in zip(record["kinds"], turns[1::2], strict=True):
            counts[item] += 1
            if answer["value"] in "ABCD":
                answers[answer["value"]] += 1
            elif item == "existence":
                answers[answer["value"].lower()] += 1
    return {
        "records": len(records),
        "turns": sum(counts.values()),
        "sources": category_counts(record["source"] for record in records),
        "questions": dict(sorted(counts.items())),
        "answers": dict(sorted(answers.items())),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to build (replaced)")
    parser.add_argument("--scenes", type=int, help="train records, instead of the size's number")
    parser.add_argument("--no-fetch", action="store_true", help="use the set drawn in code")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        manifest = build_stickervqa(
            options.out, options.size, options.seed,
            n_train_pictures=options.scenes, allow_fetch=not options.no_fetch,
        )  # fmt: skip
    except (FetchError, ValueError, OSError) as error:
        logger.error("StickerVQA was not built: %s", error)
        return 1
    logger.info("%s", json.dumps(manifest["counts"], indent=1))
    logger.info("built in %s", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
_ = (Image, picture_name)
