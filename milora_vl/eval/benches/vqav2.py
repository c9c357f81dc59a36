"""VQAv2: free short answers, scored against ten people's answers with leave-one-out accuracy.

Official files: a questions file and, where answers are published, an annotations file; images are
``COCO_{subset}_{image_id:012d}.jpg``, or without ``COCO_`` for other sets. A question may also name
its image itself, under ``image``.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring
from milora_vl.eval.answers import m4c, most_common, vqa_accuracy
from milora_vl.eval.bench_files import (
    Mirror,
    Record,
    find_file,
    find_image,
    read_json_object,
    read_mirror,
    reject_duplicates,
)
from milora_vl.eval.items import ImageSource, Item, Row
from milora_vl.eval.scoring import Files, Texts

FILES = (
    "v2_OpenEnded_mscoco_{val2014,test-dev2015,test2015}_questions.json +\n"
    "annotations; or vqa/questions.json of the demo's set"
)
VERSION = 1
METRIC = "vqa_accuracy"
MAX_NEW_TOKENS = 16
MIRRORS = (Mirror("VQAv2", None, "validation"),)

_FOLDERS = ("vqa", "vqav2", "VQAv2", ".")
_QUESTION_FILES = (
    *("questions.json", "*OpenEnded*val2014_questions.json"),
    *(
        "*OpenEnded*test-dev2015_questions.json",
        "*OpenEnded*test2015_questions.json",
        "*OpenEnded*_questions.json",
    ),
)
_ANNOTATION_FILES = ("annotations.json", "*val2014_annotations.json", "*_annotations.json")
_IMAGE_FOLDERS = (
    *("images/bench", "images/val", "../images/bench", "../images/val", "images"),
    *("val2014", "vqav2/val2014", "test2015", "vqav2/test2015", "../val2014", "coco/val2014"),
)
_FEWEST_FOR_A_GUESS = 5

parse = scoring.parse_m4c


def load(data_dir: Path | None) -> list[Item]:
    """Read questions and, if they are there, the answers.

    Args:
        data_dir: Folder with ``vqa/questions.json`` or ``v2_OpenEnded_mscoco_*_questions.json``,
            and the annotations beside it; or that questions file.
    """
    return _from_mirror() if data_dir is None else _from_files(data_dir)


def _from_files(data_dir: Path) -> list[Item]:
    path = data_dir if data_dir.is_file() else find_file(data_dir, _FOLDERS, _QUESTION_FILES)
    if path is None:
        raise FileNotFoundError(
            f"no questions.json or *OpenEnded*_questions.json in {data_dir} or its folder vqa"
        )
    content = Record(read_json_object(path), path.name)
    subset = content.text("data_subtype", "val2014").replace("test-dev", "test")
    annotated_in, annotations = _read_annotations(path)
    root = path.parent if data_dir.is_file() else data_dir
    places = (root / name for name in _IMAGE_FOLDERS)
    folders = [place for place in places if place.is_dir()] + [path.parent]
    items = []
    for row in content.records("questions"):
        image = find_image(folders, row, *_image_names(row, subset))
        key = row.text("question_id")
        if annotations is not None and key not in annotations:
            raise row.error(f"question {key} has no annotation in {annotated_in}")
        items.append(_item(row, (annotations or {}).get(key), image))
    reject_duplicates((item.id for item in items), str(path))
    return items


def _read_annotations(questions: Path) -> tuple[str, dict[str, Record] | None]:
    """Return the file's name and its rows by question; None where no answers are published."""
    own = questions.with_name(
        questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    )
    path = own if own.is_file() and own != questions else None
    if path is None and "test" not in questions.name:
        path = find_file(questions.parent, (".",), _ANNOTATION_FILES)
    if path is None:
        return "", None
    rows = Record(read_json_object(path), path.name).records("annotations")
    for row in rows:
        n_answers = len(row.records("answers"))
        if n_answers < 2:
            raise row.error(f"{n_answers} answers, two or more needed")
    ids = [row.text("question_id") for row in rows]
    reject_duplicates(ids, str(path))
    return path.name, dict(zip(ids, rows, strict=True))


def _from_mirror() -> list[Item]:
    return [
        _item(row, row if row.has("answers") and row.values["answers"] else None, image)
        for row, image in read_mirror(MIRRORS, "VQAv2")
    ]


def _image_names(row: Record, subset: str) -> list[str]:
    image_id = row.get("image_id")
    name = row.image_name("image")
    row.reject_other_images(("image", "image_id"), has_image=True)
    if name is not None or not isinstance(image_id, int):
        return [name if name is not None else row.text("image_id")]
    stem = f"{subset}_{image_id:012d}"
    return [f"COCO_{stem}.jpg", f"{stem}.png", f"{stem}.jpg"]


def _item(row: Record, annotation: Record | None, image: ImageSource) -> Item:
    question = row.text("question")
    answers: tuple[str, ...] = ()
    kinds = {"answer_type": "all", "question_type": "all"}
    if annotation is not None:
        people = annotation.records("answers")
        answers = tuple(one.text("answer", blank=True) for one in people)
        kinds = {name: annotation.text(name, "all") for name in kinds}
    return Item(
        id=row.text("question_id"),
        image=image,
        prompt=f"{question}\n{scoring.SHORT_ANSWER}",
        answers=answers,
        group=row.text("image_id"),
        category=kinds["answer_type"],
        question=question,
        details={
            "question_id": row.get("question_id"),
            "question_type": kinds["question_type"],
        },
    )


def judge(item: Item, text: str | None) -> Row:
    """Score one answer. ``text`` None is a failed sample, always wrong."""
    score = vqa_accuracy(text, item.answers) if text is not None and item.answers else 0.0
    said = None if text is None else parse(item, text)
    return scoring.judged(item, text, said, score, bool(text and text.strip()))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and breakdown (answer type, question type) of all rows."""
    return {
        **scoring.summarize_mean(
            rows, METRIC, by_question_type=lambda row: row.details["question_type"]
        ),
        "empty_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


def majority(items: Sequence[Item]) -> float:
    """Return the accuracy of answering each question type with its most frequent answer.

    Types of fewer than five questions are guessed with the answer of their answer type.
    """
    by_type = defaultdict(list)
    by_category = defaultdict(list)
    for item in items:
        by_type[item.details["question_type"]].append(most_common(item.answers))
        by_category[item.category].append(most_common(item.answers))
    total = 0.0
    for item in items:
        known = by_type[item.details["question_type"]]
        # of a few questions the most frequent answer would be luck
        if len(known) < _FEWEST_FOR_A_GUESS:
            known = by_category[item.category]
        total += vqa_accuracy(most_common(known), item.answers)
    return total / len(items)


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return the JSON list that the challenge server takes: question_id and processed answer.

    The server wants every question of test2015. After test-dev alone the others get an empty
    answer, as LLaVA does, if ``v2_OpenEnded_mscoco_test2015_questions.json`` is in ``data_dir``.
    """
    rows = [
        {"question_id": item.details["question_id"], "answer": m4c(answer)}
        for item, answer in scoring.answered(items, texts)
    ]
    asked = {item.details["question_id"] for item in items}
    root = data_dir.parent if data_dir is not None and data_dir.is_file() else data_dir
    whole = None if root is None else find_file(root, _FOLDERS, ("*_test2015_questions.json",))
    if whole is not None:
        rows_of_all = Record(read_json_object(whole), whole.name).records("questions")
        ids = [one.get("question_id") for one in rows_of_all]
        if asked <= set(ids):
            rows += [{"question_id": one, "answer": ""} for one in ids if one not in asked]
    return {"vqav2_submission.json": rows}
