"""The bench files: MMBench TSV, POPE JSON lines and VQA v2 JSON, over pictures already painted."""

import base64
import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from data_prep.sticker_names import Concept, may_deny
from data_prep.sticker_questions import LETTERS, Item, existence_question, names_in
from data_prep.sticker_scenes import Plan

ROTATION_STEP = 1_000_000
DATA_SUBTYPE = "stickervqa"
N_ANSWERS = 10
MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
    "l2-category", "comment", "split",
)  # fmt: skip
_L2 = {
    "naming photos": "fine-grained perception",
    "naming drawings": "fine-grained perception",
    "presence": "coarse perception",
    "counting": "fine-grained perception",
    "position": "relation reasoning",
    "digits": "text recognition",
    "words": "text recognition",
    "charts": "logic reasoning",
}


@dataclass(frozen=True)
class BenchPicture:
    """A painted bench picture.

    Attributes:
        number: Names the file: see ``picture_name``.
        plan: What it shows.
        png: The file.
        source: Where its cut-outs come from, for example "fluent".
    """

    number: int
    plan: Plan
    png: bytes
    source: str

    @property
    def file_name(self) -> str:
        """Return the name of the file below ``images/bench`` or ``images/val``."""
        return picture_name(self.number)


def picture_name(number: int) -> str:
    """Return the VQA-style file name of a picture number."""
    return f"{DATA_SUBTYPE}_{number:012d}.png"


def mmbench_tsv(rows: Sequence[tuple[BenchPicture, Item, str]], split: str) -> str:
    """Write lettered questions with their circular rotations.

    Args:
        rows: (picture, lettered item, category) of each base question.
        split: Text of the split column.

    Returns:
        Tab-separated text; row ``base + k * 1_000_000`` has the options moved k places on, and
        names the base row's index instead of repeating its picture.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(MMBENCH_COLUMNS)
    for turn in range(len(LETTERS)):
        for base, (picture, item, category) in enumerate(rows):
            options = item.options[-turn:] + item.options[:-turn] if turn else item.options
            image = str(base) if turn else base64.b64encode(picture.png).decode()
            writer.writerow(
                (
                    base + turn * ROTATION_STEP, item.question, "", *options,
                    LETTERS[options.index(item.answer)], category, image, picture.source,
                    _L2[category], "", split,
                )
            )  # fmt: skip
    return buffer.getvalue()


def balanced_existence(
    rng: Random,
    kind: str,
    pictures: Sequence[BenchPicture],
    concepts: dict[str, Concept],
    n_rows: int,
) -> list[tuple[BenchPicture, str, str]]:
    """Ask for objects so that each has as many "yes" as "no".

    Args:
        rng: Random source.
        kind: "random": a "no" in any picture; "popular": only about the objects shown most;
            "adversarial": a "no" in a picture that holds a mate from the object's subgroup.
        pictures: Scenes.
        concepts: All, by name.
        n_rows: Rows wanted, even; fewer if the pictures do not give as many.

    Returns:
        (picture, object, "yes" or "no"), shuffled, no question twice about a picture.
    """
    holds = [(picture, names_in(picture.plan)) for picture in pictures]
    shown = Counter(name for _, names in holds for name in names)
    wanted = list(shown)
    if kind == "popular":
        wanted = [name for name, _ in shown.most_common(max(4, len(shown) // 3))]
    yes: dict[str, list[BenchPicture]] = {}
    no: dict[str, list[BenchPicture]] = {}
    for name in wanted:
        yes[name] = [picture for picture, names in holds if name in names]
        no[name] = [
            picture
            for picture, names in holds
            if may_deny(concepts[name], [concepts[each] for each in names])
            and (kind != "adversarial" or _has_mate(concepts, name, names))
        ]
        rng.shuffle(yes[name])
        rng.shuffle(no[name])
    rows: list[tuple[BenchPicture, str, str]] = []
    while len(rows) < n_rows:
        left = [name for name in wanted if yes[name] and no[name]]
        rng.shuffle(left)
        if not left:
            break
        for name in left[: (n_rows - len(rows)) // 2]:
            rows.append((yes[name].pop(), name, "yes"))
            rows.append((no[name].pop(), name, "no"))
    rng.shuffle(rows)
    return rows


def pope_rows(rows: Iterable[tuple[BenchPicture, str, str]]) -> list[dict[str, Any]]:
    """Return questions from ``balanced_existence`` as POPE records."""
    return [
        {
            "question_id": index,
            "image": picture.file_name,
            "text": existence_question(name),
            "label": label,
        }
        for index, (picture, name, label) in enumerate(rows, start=1)
    ]


def _has_mate(concepts: dict[str, Concept], name: str, names: Iterable[str]) -> bool:
    subgroup = concepts[name].subgroup
    return any(each != name and concepts[each].subgroup == subgroup for each in names)


def vqa_files(rows: Sequence[tuple[BenchPicture, Item]]) -> tuple[dict, dict]:
    """Return questions and annotations in the layout of VQA v2, ten equal answers each.

    Args:
        rows: (picture, item) of each question.
    """
    head = {
        "info": {"description": "StickerVQA bench questions in VQA v2 format", "version": "1"},
        "license": {"name": "see ATTRIBUTION.md", "url": ""},
        "data_type": "mscoco",
        "data_subtype": DATA_SUBTYPE,
    }
    questions, annotations = [], []
    for index, (picture, item) in enumerate(rows):
        key = {"question_id": picture.number * 1000 + index % 1000, "image_id": picture.number}
        questions.append({"image_id": key["image_id"], "question": item.question, **key})
        annotations.append(
            {
                **key,
                "question_type": _question_type(item.question),
                "answer_type": answer_type(item.answer),
                "multiple_choice_answer": item.answer,
                "answers": [
                    {"answer": item.answer, "answer_confidence": "yes", "answer_id": each}
                    for each in range(1, N_ANSWERS + 1)
                ],
            }
        )
    return (
        {**head, "task_type": "Open-Ended", "questions": questions},
        {**head, "annotations": annotations},
    )


def answer_type(answer: str) -> str:
    """Return the VQA answer type: "yes/no", "number" or "other"."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def _question_type(question: str) -> str:
    words = question.rstrip("?").lower().split()
    return " ".join(words[:2])


def json_lines(rows: Iterable[dict]) -> str:
    """Return one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def letter_counts(rows: Sequence[tuple[BenchPicture, Item, str]]) -> dict[str, int]:
    """Return how often each letter is the right one in the base rows."""
    counts = Counter(item.letter for _, item, _ in rows)
    return {letter: counts[letter] for letter in LETTERS}


def category_counts(categories: Iterable[str]) -> dict[str, int]:
    """Return how many of each, sorted by name."""
    counts: dict[str, int] = defaultdict(int)
    for category in categories:
        counts[category] += 1
    return dict(sorted(counts.items()))
