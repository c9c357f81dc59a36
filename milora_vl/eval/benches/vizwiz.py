"""VizWiz: blind people's own photos and questions; "unanswerable" is an answer like any other.

Official files: ``val.json`` or ``test.json``, a list of ``image, question, answers`` (test: no
answers, for the evaluation server); pictures in ``val/`` or ``test/``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import m4c
from milora_vl.eval.bench_files import Mirror, locate, picture_file, read_json_list, read_mirror
from milora_vl.eval.items import ImageSource, Item, Row, reject_duplicates, require, take_sample

VERSION = 1
METRIC = "vqa_accuracy"
MAX_NEW_TOKENS = 16
MIRRORS = (Mirror("VizWiz-VQA", None, "val"),)

_FOLDERS = ("vizwiz", "VizWiz", "vizwiz/Annotations", "VizWiz/Annotations", "Annotations")
_FILES = ("val.json", "test.json")
_IMAGE_FOLDERS = ("val", "test", "images", "../val", "../test", "../images")
_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

parse = scoring.parse_m4c
judge = scoring.judge_m4c
headline_sums = scoring.mean_sums
headline = statistics.ratio


def load(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read the questions.

    Args:
        data_dir: Folder with ``val.json`` (else ``test.json``), or one of these files; None: hub
            mirror of the validation split.
        limit: Number of questions.

    Raises:
        FileNotFoundError: If there is no questions file.
        MirrorError: If the mirror cannot be loaded.
        ValueError: If the file is malformed.
    """
    if data_dir is None:
        items = []
        for row, image, where in read_mirror(MIRRORS, "VizWiz"):
            people = [{"answer": answer} for answer in row["answers"] or ()]
            name = f"{row['question_id']}.jpg"
            official = {"image": name, "question": row["question"], "answers": people}
            official["answer_type"] = row.get("category") or "all"
            items.append(_item(official, image, where))
        return take_sample(items, limit)
    path = locate(data_dir, _FOLDERS, _FILES, "VizWiz questions")
    items = []
    for place, row in enumerate(read_json_list(path)):
        where = f"{path.name}[{place}]"
        image = picture_file(path, _IMAGE_FOLDERS, where, str(require(row, "image", where)))
        items.append(_item(row, image, where))
    reject_duplicates((item.id for item in items), str(path))
    return take_sample(items, limit)


def _item(row: dict[str, Any], image: ImageSource, where: str) -> Item:
    question = require(row, "question", where)
    answers = tuple(str(one["answer"]) for one in row.get("answers") or ())
    if len(answers) == 1:
        raise ValueError(f"{where}: 1 answer, two or more needed")
    return Item(
        id=str(row["image"]),
        image=image,
        prompt=f"{question}\n{_UNANSWERABLE}\n{scoring.SHORT_ANSWER}",
        answers=answers,
        group=str(row["image"]),
        category=str(row.get("answer_type", "all")),
        question=question,
    )


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and breakdown by answer type."""
    said = [row.parsed for row in rows]
    return {
        **scoring.summarise_mean(rows, METRIC),
        "unanswerable_rate": said.count("unanswerable") / len(rows),
        "empty_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of one constant answer, which is "unanswerable" in the official files."""
    return scoring.best_constant(items, judge, lambda item: "all")


def write_submission(
    items: Sequence[Item],
    texts: Mapping[str, str | None],
    out_dir: Path,
    data_dir: Path | None = None,
) -> list[Path]:
    """Write the JSON list that the evaluation server takes: image and processed answer."""
    del data_dir
    rows = [
        {"image": item.id, "answer": m4c(answer)}
        for item in items
        if (answer := texts[item.id]) is not None
    ]
    return scoring.write_json(out_dir / "vizwiz_submission.json", rows)
