"""Build StickerVQA in a temporary folder: plan, paint, ask, count, and write ATTRIBUTION."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from data_prep.sticker import benches, train
from data_prep.sticker.benches import BenchPainter, BenchPicture, BenchPlanner
from data_prep.sticker.charts import BENCH_TABLES, TRAIN_TABLES, bar_series
from data_prep.sticker.pictures import Plan, paint_to_file
from data_prep.sticker.pool import worker_pool
from data_prep.sticker.sources import Catalogue
from data_prep.sticker.train import Split, Stage
from milora_vl.files import sha256_of, write_json_atomic, write_text_atomic


def attribution_text(catalogue: Catalogue) -> str:
    """Return Markdown that names author, package, version and licence of every source used."""
    lines = [
        "# Attribution of this StickerVQA set",
        "",
        "The pictures are composed from the drawings, photos, digits and tables below: cut out,",
        "scaled, mirrored and put on plain backgrounds. Share pictures under the licences named",
        "(CC-BY and CC-BY-SA ask for this notice; CC-BY-SA and GPL-2 also bind what is made from",
        "them). Scores on the set are StickerVQA scores, not MMBench, POPE or VQA scores.",
        "",
    ]
    if not catalogue.used:
        lines.append("All pictures were drawn in code; there is nothing to attribute.")
    else:
        lines += ["| part | package | version | author | licence |", "|---|---|---|---|---|"]
        lines += [
            f"| {each.name} | {each.package} ({each.registry}) | {each.version} | {each.author} "
            f"| {each.licence} |"
            for each in catalogue.used
        ]
    return "\n".join(lines) + "\n"


VERSION = 7
TRAIN_DIGITS, VAL_DIGITS, BENCH_DIGITS = (0.0, 0.7), (0.7, 0.8), (0.8, 1.0)
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
        shares: Share of each kind of record in train, and with it what is asked at all.
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
    shares: Mapping[str, float] = field(default_factory=lambda: train.FULL_SHARES)


SIZES = {
    "core": Sizes(3000, 200, 4, 120, 100, 200, 200, 100, 160, train.CORE_SHARES),
    "full": Sizes(6000, 400, 8, 1000, 300, 500, 300, 500, 420),
    "tiny": Sizes(60, 12, 4, 24, 12, 24, 12, 20, 24),
}
"""``tiny`` is for tests."""


class Builder:
    """One build: plans, paints and writes everything below a folder."""

    def __init__(
        self, folder: Path, catalogue: Catalogue, sizes: Sizes, seed: int, show_progress: bool
    ) -> None:
        """Keep what the steps share; ``seed`` decides everything that is drawn by chance."""
        self.folder = folder
        self.catalogue = catalogue
        self.sizes = sizes
        self.seed = seed
        self.show_progress = show_progress
        self.aspects = aspects_of(catalogue)
        self.train_hashes: list[int] = []
        self.picture_digests: dict[str, str] = {}
        self.counts: dict[str, Any] = {}

    def build(self, n_train: int, size: str) -> dict[str, Any]:
        """Fill the empty folder, with ``n_train`` records in train; returns the manifest."""
        for name in ("train", "val", "bench"):
            (self.folder / "images" / name).mkdir(parents=True)
        tables = self.catalogue.tables
        train_styles, bench_styles = self.catalogue.train_styles, self.catalogue.bench_styles
        learned, held_out = bar_series(tables, TRAIN_TABLES), bar_series(tables, BENCH_TABLES)
        train_split = self._split(train_styles, False, TRAIN_DIGITS, learned)
        train_split.varied_ratio = train.VARIED_RATIO
        val_split = self._split(train_styles, False, VAL_DIGITS, learned)
        self._records("train", train_split, n_train)
        self._records("val", val_split, self.sizes.n_val)
        self._benches("val", val_split, held_out=False)
        bench_split = self._split(bench_styles, True, BENCH_DIGITS, held_out)
        self._benches("bench", bench_split, held_out=True)
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
        return Split(stage, digit_span, series, shares=self.sizes.shares)

    def _records(self, name: str, split: Split, n_records: int) -> None:
        records, plans = train.plan_records(Random(f"{self.seed}/{name}"), split, n_records, name)
        paint_job = partial(_paint_one, self.catalogue.sprites, self.folder)
        with worker_pool(paint_job) as results:
            done = zip(self._bar(plans, name), results(plans), strict=True)
            for _, (path, digest, picture_hash) in done:
                self.picture_digests[path] = digest
                if name == "train":
                    self.train_hashes.append(picture_hash)
        self.counts[name] = _record_counts(records)
        write_text_atomic(
            self.folder / f"{name}.json", json.dumps(records, ensure_ascii=False, indent=0) + "\n"
        )
        if name == "train":
            captions = json.dumps(train.caption_records(records), ensure_ascii=False, indent=0)
            write_text_atomic(self.folder / "captions.json", captions + "\n")

    def _benches(self, name: str, split: Split, *, held_out: bool) -> None:
        sizes = self.sizes
        rng = Random(f"{self.seed}/{name}/bench")
        place = self.folder if held_out else self.folder / "val"
        n_mmbench, n_pope = (
            (sizes.n_mmbench, sizes.n_pope) if held_out else (sizes.n_val_mmbench, sizes.n_val_pope)
        )
        n_vqa = sizes.n_vqa if held_out else 0
        painter = BenchPainter(
            self.catalogue.sprites, keep_off=self.train_hashes if held_out else ()
        )
        planner = BenchPlanner(split, held_out, painter.paint)

        lettered = list(
            self._bar(planner.lettered(rng, n_mmbench), f"{name} lettered questions", n_mmbench)
        )
        write_text_atomic(place / "mmbench.tsv", benches.mmbench_tsv(lettered, name))
        scenes = list(
            self._bar(planner.scenes(rng, sizes.n_scenes), f"{name} scenes", sizes.n_scenes)
        )
        self._write(name, scenes)
        pope = {}
        for kind in _POPE_KINDS if held_out else _POPE_KINDS[:1]:
            rows = benches.balanced_existence(rng, kind, scenes, split.concepts, n_pope)
            write_text_atomic(place / "pope" / f"{kind}.jsonl", benches.pope_lines(rows))
            pope[kind] = _count(label for _, _, label in rows)
        counts: dict[str, Any] = {
            "mmbench_base": _count(category for _, _, category in lettered),
            "mmbench_letters": dict.fromkeys("ABCD", 0) | _count(x.letter for _, x, _ in lettered),
            "pope": pope,
        }
        if held_out:
            rows = list(
                self._bar(planner.open_questions(rng, scenes, n_vqa), "open questions", n_vqa)
            )
            self._write(name, [picture for picture, _ in rows])
            questions, annotations = benches.vqa_files(rows)
            write_json_atomic(place / "vqa" / "questions.json", questions)
            write_json_atomic(place / "vqa" / "annotations.json", annotations)
            shown = [*scenes, *(picture for picture, _ in rows)]
            truth = {picture.file_name: train.boxes_of(picture.plan) for picture in shown}
            write_json_atomic(place / "bench_objects.json", truth)
            counts["vqa"] = _count(row["answer_type"] for row in annotations["annotations"])
        self.counts[f"{name}_benches"] = counts

    def _write(self, name: str, pictures: Sequence[BenchPicture]) -> None:
        for picture in pictures:
            path = f"images/{name}/{picture.file_name}"
            (self.folder / path).write_bytes(picture.png)
            self.picture_digests[path] = hashlib.sha256(picture.png).hexdigest()

    def _bar(self, rows: Iterable, text: str, total: int | None = None) -> tqdm:
        return tqdm(
            rows,
            f"StickerVQA {text}",
            total,
            unit="pic",
            mininterval=0.5,
            disable=not self.show_progress,
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


def aspects_of(catalogue: Catalogue) -> dict[tuple[str, str, int], float]:
    """Return width / height of every cut-out, by style, concept and variant."""
    aspects = {}
    for style, by_name in catalogue.sprites.items():
        for name, files in by_name.items():
            for variant, data in enumerate(files):
                # width and height are the first fields of a PNG file's header
                width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
                aspects[style, name, variant] = width / height
    return aspects


def _paint_one(
    sprites: dict[str, dict[str, list[bytes]]], folder: Path, job: tuple[str, Plan]
) -> tuple[str, str, int]:
    path, plan = job
    return (path, *paint_to_file(plan, sprites, folder / path))


def _record_counts(records: list[dict]) -> dict[str, Any]:
    asked = [
        (kind, answer["value"])
        for record in records
        for kind, answer in zip(record["kinds"], record["conversations"][1::2], strict=True)
    ]
    return {
        "records": len(records),
        "turns": len(asked),
        "sources": _count(record["source"] for record in records),
        "questions": _count(kind for kind, _ in asked),
        "answers": _count(
            answer if answer in "ABCD" else answer.lower()
            for kind, answer in asked
            if answer in "ABCD" or kind == "existence"
        ),
    }


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
