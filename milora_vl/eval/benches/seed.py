"""SEED-Bench: lettered questions on pictures, and on videos of which the middle frame is shown.

Official file: ``SEED-Bench.json``; pictures in ``SEED-Bench-image/``, extracted frames in
``SEED-Bench-video-image/``. ``seed`` asks all, ``seed-image`` the picture questions: two numbers
that must not be mixed. Letters are scored, never the text of an option.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring, statistics
from milora_vl.eval.bench_files import Mirror, locate, picture_file, read_mirror
from milora_vl.eval.items import (
    ImageSource,
    Item,
    Row,
    read_json_object,
    reject_duplicates,
    require,
    take_sample,
)

VERSION = 1
METRIC = "accuracy"
METRIC_IMAGE = "image_accuracy"
MAX_NEW_TOKENS = 8
MIRRORS = (Mirror("SEED-Bench", None, "test"),)

_FOLDERS = ("seed_bench", "seed", "SEED-Bench", "seed-bench")
_IMAGE_FOLDERS = ("SEED-Bench-image", "SEED-Bench-video-image", "images")
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")

headline_sums = scoring.mean_sums
headline = statistics.ratio


def load(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read all questions, of pictures and of videos.

    Args:
        data_dir: Folder with ``SEED-Bench.json``, or that file; None: hub mirror.
        limit: Number of questions.

    Raises:
        FileNotFoundError: If there is no questions file.
        MirrorError: If the mirror cannot be loaded.
        ValueError: If the file is malformed.
    """
    return take_sample(_read(data_dir), limit)


def load_images(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read the picture questions; see ``load``."""
    items = [item for item in _read(data_dir) if item.details["data_type"] == "image"]
    return take_sample(items, limit)


def _read(data_dir: Path | None) -> list[Item]:
    if data_dir is None:
        return [
            _item(row, image, {}, where)
            for row, image, where in read_mirror(MIRRORS, "SEED-Bench", _middle_frame)
        ]
    path = locate(data_dir, _FOLDERS, ("*SEED-Bench.json",), "SEED-Bench questions")
    content = read_json_object(path)
    names = {str(number): name for name, number in content.get("question_type", {}).items()}
    items = []
    for place, row in enumerate(require(content, "questions", str(path))):
        where = f"{path.name} questions[{place}]"
        image = picture_file(path, _IMAGE_FOLDERS, where, *_file_names(row, where))
        items.append(_item(row, image, names, where))
    reject_duplicates((item.id for item in items), str(path))
    return items


def _middle_frame(row: Mapping[str, Any]) -> Any:
    frames = row["image"]
    return frames[len(frames) // 2] if frames else None


def _file_names(row: dict[str, Any], where: str) -> list[str]:
    """Return what a picture may be called; a video's frame is named by question or by video."""
    data_id = str(require(row, "data_id", where))
    if row.get("data_type") == "image":
        return [data_id, f"{data_id}.jpg", f"{data_id}.png"]
    number, kind = row["question_id"], row.get("question_type_id")
    stems = (str(number), f"{kind}_{number}", Path(data_id).stem)
    return [f"{stem}{suffix}" for stem in stems for suffix in (".png", ".jpg")]


def _item(row: dict[str, Any], image: ImageSource, names: Mapping[str, str], where: str) -> Item:
    question = require(row, "question", where)
    options = tuple(str(require(row, name, where)) for name in _CHOICES)
    kind = str(row.get("question_type_id", "all"))
    answer = row.get("answer")
    letters = tuple(scoring.LETTERS[: len(options)])
    return Item(
        id=str(row["question_id"]),
        image=image,
        prompt="\n".join([question, *scoring.lettered(options), scoring.LETTER_ANSWER]),
        answers=() if answer is None else (str(answer),),
        group=str(row.get("data_id", row["question_id"])),
        category=names.get(kind, kind),
        options=options,
        question=question,
        details={"data_type": str(row.get("data_type", "image"))},
        choices=letters,
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


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over all, and over pictures and videos beside it."""
    parts = {
        name: scoring.mean_score([row for row in rows if row.details["data_type"] == name])
        for name in ("image", "video")
    }
    return {**_summarise(rows, METRIC), **parts}


def summarise_images(rows: Sequence[Row]) -> dict[str, Any]:
    """Return accuracy over picture questions."""
    return _summarise(rows, METRIC_IMAGE)


def _summarise(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    lenient = sum(row.details["lenient"] in row.answers for row in rows) / len(rows)
    return {
        **scoring.summarise_mean(rows, metric),
        "lenient_accuracy": lenient,
        "unparsed_rate": sum(row.parsed is None for row in rows) / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of the best constant letter of each question type, or of chance."""
    return scoring.best_constant(items, judge)


def write_submission(
    items: Sequence[Item],
    texts: Mapping[str, str | None],
    out_dir: Path,
    data_dir: Path | None = None,
) -> list[Path]:
    """Write the JSON lines of SEED-Bench's leaderboard: question_id and prediction."""
    del data_dir
    rows = [
        {"question_id": item.id, "prediction": answer}
        for item in items
        if (answer := texts[item.id]) is not None
    ]
    return scoring.write_json_lines(out_dir / "seed_submission.jsonl", rows)
