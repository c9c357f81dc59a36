"""VQAv2: free short answers, scored against ten people's answers with leave-one-out accuracy.

Official files: a questions file and, where answers are published, an annotations file; pictures are
``COCO_{subset}_{image_id:012d}.jpg``, or without ``COCO_`` for other sets. A question may also name
its picture itself, under ``image``.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring, statistics
from milora_vl.eval.answers import m4c, most_common, vqa_accuracy
from milora_vl.eval.bench_files import Mirror, read_mirror
from milora_vl.eval.items import (
    ImageSource,
    Item,
    Row,
    find_file,
    find_image,
    read_json_object,
    reject_duplicates,
    require,
    take_sample,
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
headline_sums = scoring.mean_sums
headline = statistics.ratio


def load(data_dir: Path | None, *, limit: int | None = None) -> list[Item]:
    """Read questions and, if they are there, the answers.

    Args:
        data_dir: Folder with ``vqa/questions.json`` or ``v2_OpenEnded_mscoco_*_questions.json``,
            and the annotations beside it; or that questions file; None: hub mirror of val2014.
        limit: Number of questions.

    Raises:
        FileNotFoundError: If there is no questions file.
        ValueError: If a file is malformed, an id occurs twice, or a question has no annotation.
    """
    if data_dir is None:
        return take_sample(_from_mirror(), limit)
    path = data_dir if data_dir.is_file() else find_file(data_dir, _FOLDERS, _QUESTION_FILES)
    if path is None:
        raise FileNotFoundError(
            f"no questions.json or *OpenEnded*_questions.json in {data_dir} or its folder vqa"
        )
    content = read_json_object(path)
    questions = require(content, "questions", str(path))
    subset = str(content.get("data_subtype", "val2014")).replace("test-dev", "test")
    annotations = _read_annotations(path)
    root = path.parent if data_dir.is_file() else data_dir
    places = (root / name for name in _IMAGE_FOLDERS)
    folders = [place for place in places if place.is_dir()] + [path.parent]
    items = []
    for place, row in enumerate(questions):
        where = f"{path.name} questions[{place}]"
        names = _image_names(row, subset, where)
        image = ImageSource(where, path=find_image(folders, *names))
        items.append(_item(row, where, annotations, image))
    reject_duplicates((item.id for item in items), str(path))
    return take_sample(items, limit)


def _read_annotations(questions: Path) -> dict[str, dict[str, Any]] | None:
    own = questions.with_name(
        questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    )
    path = own if own.is_file() else None
    if path is None and "test" not in questions.name:
        path = find_file(questions.parent, (".",), _ANNOTATION_FILES)
    if path is None:
        return None
    rows = require(read_json_object(path), "annotations", str(path))
    for place, row in enumerate(rows):
        n_answers = len(require(row, "answers", f"{path.name} annotations[{place}]"))
        if n_answers < 2:
            raise ValueError(
                f"{path} annotations[{place}]: {n_answers} answers, two or more needed"
            )
    return {str(row["question_id"]): row for row in rows}


def _from_mirror() -> list[Item]:
    items = []
    for row, image, where in read_mirror(MIRRORS, "VQAv2"):
        annotations = {str(row["question_id"]): row} if row.get("answers") else None
        items.append(_item(row, where, annotations, image))
    return items


def _image_names(row: dict[str, Any], subset: str, where: str) -> list[str]:
    image_id = require(row, "image_id", where)
    if "image" in row or not isinstance(image_id, int):
        return [str(row.get("image", image_id))]
    stem = f"{subset}_{image_id:012d}"
    return [f"COCO_{stem}.jpg", f"{stem}.png", f"{stem}.jpg"]


def _item(
    row: dict[str, Any],
    where: str,
    annotations: dict[str, dict[str, Any]] | None,
    image: ImageSource,
) -> Item:
    question_id = require(row, "question_id", where)
    question = require(row, "question", where)
    answer: dict[str, Any] = {}
    if annotations is not None:
        if str(question_id) not in annotations:
            raise ValueError(f"{where}: question {question_id} has no annotation")
        answer = annotations[str(question_id)]
    return Item(
        id=str(question_id),
        image=image,
        prompt=f"{question}\n{scoring.SHORT_ANSWER}",
        answers=tuple(str(one["answer"]) for one in answer.get("answers", ())),
        group=str(row["image_id"]),
        category=str(answer.get("answer_type", "all")),
        question=question,
        details={
            "question_id": question_id,
            "question_type": str(answer.get("question_type", "all")),
        },
    )


def judge(item: Item, text: str | None) -> Row:
    """Score one answer. ``text`` None is a failed sample, always wrong."""
    score = vqa_accuracy(text, item.answers) if text is not None and item.answers else 0.0
    said = None if text is None else parse(item, text)
    return scoring.judged(item, text, said, score, bool(text and text.strip()))


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score, interval and breakdown (answer type, question type) of all rows."""
    return {
        **scoring.summarise_mean(
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
        if len(known) < _FEWEST_FOR_A_GUESS:
            known = by_category[item.category]
        total += vqa_accuracy(most_common(known), item.answers)
    return total / len(items)


def write_submission(
    items: Sequence[Item],
    texts: Mapping[str, str | None],
    out_dir: Path,
    data_dir: Path | None = None,
) -> list[Path]:
    """Write the JSON list that the challenge server takes: question_id and processed answer.

    The server wants every question of test2015. After test-dev alone the others get an empty
    answer, as LLaVA does, if ``v2_OpenEnded_mscoco_test2015_questions.json`` is in ``data_dir``.
    """
    rows = [
        {"question_id": item.details["question_id"], "answer": m4c(answer)}
        for item in items
        if (answer := texts[item.id]) is not None
    ]
    asked = {item.details["question_id"] for item in items}
    root = data_dir.parent if data_dir is not None and data_dir.is_file() else data_dir
    whole = None if root is None else find_file(root, _FOLDERS, ("*_test2015_questions.json",))
    if whole is not None:
        ids = [one["question_id"] for one in read_json_object(whole)["questions"]]
        if asked <= set(ids):
            rows += [{"question_id": one, "answer": ""} for one in ids if one not in asked]
    return scoring.write_json(out_dir / "vqav2_submission.json", rows)
