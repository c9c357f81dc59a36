"""SEED-Bench: lettered questions on images, and on videos of which the middle frame is shown.

Official file: ``SEED-Bench.json``; images in ``SEED-Bench-image/``, extracted frames in
``SEED-Bench-video-image/``. ``seed`` asks all, ``seed-image`` the image questions and
``seed-video`` those of videos, shown from the video files in ``SEED-Bench-video/`` to a model that
takes videos: three numbers that must not be mixed. Letters are scored, never the text of an option.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring
from milora_vl.eval.bench_files import (
    BenchError,
    Mirror,
    Record,
    gold_letter,
    image_file,
    locate,
    read_json_object,
    read_mirror,
    reject_duplicates,
    shorten,
)
from milora_vl.eval.items import ImageSource, Item, Row, VideoSource

FILES = "SEED-Bench.json: images, and middle frames of videos"
VERSION = 1
METRIC = "accuracy"
METRIC_IMAGE = "image_accuracy"
METRIC_VIDEO = "video_accuracy"
MAX_NEW_TOKENS = 8
MIRRORS = (Mirror("SEED-Bench", None, "test"),)

_FOLDERS = ("seed_bench", "seed", "SEED-Bench", "seed-bench")
_IMAGE_FOLDERS = ("SEED-Bench-image", "SEED-Bench-video-image", "images")
_VIDEO_FOLDERS = ("SEED-Bench-video", "videos")
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def load_images(data_dir: Path | None) -> list[Item]:
    """Read the image questions."""
    return [item for item in load(data_dir) if item.details["data_type"] == "image"]


def load_videos(data_dir: Path | None) -> list[Item]:
    """Read the video questions, each with its video in place of a frame."""
    if data_dir is None:
        raise BenchError(
            "the mirror holds frames: give --data with SEED-Bench-video/ for seed-video"
        )
    return [item for item in load(data_dir, as_videos=True) if item.video]


def load(data_dir: Path | None, *, as_videos: bool = False) -> list[Item]:
    """Read all questions, of images and of videos, shown as a frame or whole."""
    if data_dir is None:
        rows = read_mirror(MIRRORS, "SEED-Bench", _middle_frame)
        return [_item(row, image, {}) for row, image in rows]
    path = locate(data_dir, _FOLDERS, ("*SEED-Bench.json",), "SEED-Bench questions")
    content = Record(read_json_object(path), path.name)
    kinds = content.object("question_type")
    names = {kinds.text(name): name for name in kinds.values}
    items = []
    for row in content.records("questions"):
        row.reject_other_images(("data_id",), has_image=True)
        image = image_file(path, _IMAGE_FOLDERS, row, *_file_names(row))
        item = _item(row, image, names)
        if as_videos and item.details["data_type"] == "video":
            item = replace(item, image=None, video=_video(path, row))
        items.append(item)
    reject_duplicates((item.id for item in items), str(path))
    return items


def _video(path: Path, row: Record) -> VideoSource:
    """Return the video of a row, of which it may name a part by its start and end in seconds."""
    file = image_file(path, _VIDEO_FOLDERS, row, row.text("data_id")).path
    span = row.values.get("segment")
    if span is None:
        return VideoSource(row.where, file)
    is_span = isinstance(span, list) and len(span) == 2
    if not is_span or not all(isinstance(one, int | float) and one >= 0 for one in span):
        raise row.error(f"segment {shorten(repr(span))} is no pair of seconds")
    return VideoSource(row.where, file, (float(span[0]), float(span[1])))


def _middle_frame(row: Mapping[str, Any]) -> Any:
    frames = row["image"]
    if isinstance(frames, list):  # of a video all its frames, of an image a list of one
        return frames[len(frames) // 2] if frames else None
    return frames


def _file_names(row: Record) -> list[str]:
    """Return what an image may be called; a video's frame is named by question or by video."""
    data_id = row.text("data_id")
    if _data_type(row) == "image":
        return [data_id, f"{data_id}.jpg", f"{data_id}.png"]
    number, kind = row.text("question_id"), row.text("question_type_id", "None")
    stems = (number, f"{kind}_{number}", Path(data_id).stem)
    return [f"{stem}{suffix}" for stem in stems for suffix in (".png", ".jpg")]


def _data_type(row: Record) -> str:
    kind = row.text("data_type", "image")
    if kind not in ("image", "video"):
        raise row.error(f"data_type {kind!r} is neither image nor video")
    return kind


def _item(row: Record, image: ImageSource, names: Mapping[str, str]) -> Item:
    question = row.text("question")
    options = tuple(row.text(name, blank=True) for name in _CHOICES)
    kind = row.text("question_type_id", "all")
    number = row.text("question_id")
    return Item(
        id=number,
        image=image,
        prompt="\n".join([question, *scoring.lettered(options), scoring.LETTER_ANSWER]),
        answers=(gold_letter(row.text("answer"), options, row),) if row.has("answer") else (),
        group=row.text("data_id", number),
        category=names.get(kind, kind),
        options=options,
        question=question,
        details={"data_type": _data_type(row)},
        choices=tuple(scoring.LETTERS[: len(options)]),
    )


def parse(item: Item, text: str) -> str | None:
    """Return the letter if the answer is one and nothing else, LLaVA's rule."""
    return text if text in item.choices else None


def judge(item: Item, text: str | None) -> Row:
    """Score one answer: 1 for the right letter. ``text`` None is a failed sample, always wrong."""
    letter = None if text is None else parse(item, text)
    lenient = text.strip()[:1].upper() if text else None
    return scoring.judged(
        item, text, letter, float(letter in item.answers), letter is not None, {"lenient": lenient}
    )


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over all, and over images and videos beside it."""
    parts = {
        name: scoring.mean_score([row for row in rows if row.details["data_type"] == name])
        for name in ("image", "video")
    }
    return {**_summarize(rows, METRIC), **parts}


def summarize_images(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over image questions."""
    return _summarize(rows, METRIC_IMAGE)


def summarize_videos(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over video questions."""
    return _summarize(rows, METRIC_VIDEO)


def _summarize(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    return {**scoring.summarize_mean(rows, metric), **scoring.letter_rates(rows)}


# what SEED-Bench's leaderboard takes
submission = scoring.one_file(
    "seed_submission.jsonl", lambda item, text: {"question_id": item.id, "prediction": text}
)

VARIANTS = {
    "seed-image": {
        "FILES": "the same: images alone",
        "load": load_images,
        "summarize": summarize_images,
        "METRIC": METRIC_IMAGE,
    },
    "seed-video": {
        "FILES": "the same: videos, from SEED-Bench-video/, of a model that takes videos",
        "load": load_videos,
        "summarize": summarize_videos,
        "METRIC": METRIC_VIDEO,
    },
}
