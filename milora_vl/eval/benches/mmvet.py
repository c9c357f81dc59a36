"""MM-Vet: open questions that need several skills at once; a judge model scores the answers.

Official file: ``mm-vet.json``, an object of ``imagename, question, answer, capability`` by id;
images in ``images/``. Without a judge the official prediction file and the judge's prompts are
written and there is no score. The judge's prompt is worded here and not MM-Vet's own, so scores
compare with others of the same judge and version only.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from milora_vl.eval import scoring
from milora_vl.eval.bench_files import (
    Mirror,
    Record,
    by_id,
    image_file,
    locate,
    read_mirror,
)
from milora_vl.eval.items import ImageSource, Item, Row
from milora_vl.eval.scoring import Files, Texts

FILES = "mm-vet.json"
VERSION = 1
METRIC = "judge_score"
MAX_NEW_TOKENS = 1024
JUDGE_PROMPT = "milora_vl mmvet 1"
MIRRORS = (Mirror("MMVet", None, "test"),)

_FOLDERS = ("mm-vet", "mmvet", "MMVet")
_IMAGE_FOLDERS = ("images", "mm-vet/images")
_NUMBER = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?)(?![\d.]*\d)")
# with any change of it or of judge_prompt, JUDGE_PROMPT gets a new number
_INSTRUCTION = """\
You grade an answer to a question about a picture that you cannot see, by a reference. In the
reference, <AND> joins parts that must all be there, <OR> joins parts of which one is enough.
Grade from 0.0 (all wrong) to 1.0 (all right) in steps of 0.1, in proportion to what is right.
Reply with the grade alone.
"""

parse = scoring.parse_free
judge = scoring.judge_free
majority = scoring.no_majority


def load(data_dir: Path | None) -> list[Item]:
    """Read the questions."""
    if data_dir is None:
        rows = read_mirror(MIRRORS, "MM-Vet")
        return [_item(row.text("question_id"), row, image) for row, image in rows]
    path = locate(data_dir, _FOLDERS, ("*mm-vet.json",), "MM-Vet questions")
    items = []
    for key, row in by_id(path, "question"):
        name = row.image_name("imagename") or row.text("imagename")
        row.reject_other_images(("imagename", "imagesource"), has_image=True)
        items.append(_item(key, row, image_file(path, _IMAGE_FOLDERS, row, name)))
    return items


def _item(key: str, row: Record, image: ImageSource) -> Item:
    question = row.text("question")
    skills = row.values.get("capability")
    # the mirror writes the list as one text, joined by commas
    names = skills.split(",") if isinstance(skills, str) else row.texts("capability", ())
    skills = sorted(name.strip() for name in names)
    return Item(
        id=key,
        image=image,
        prompt=question,
        answers=(),
        group=key,
        category="+".join(skills) or "all",
        question=question,
        details={"reference": row.text("answer"), "skills": skills},
    )


def judge_prompt(item: Item, text: str) -> str:
    """Return what the judge is asked about an answer."""
    return (
        f"{_INSTRUCTION}\nQuestion: {item.question}\nReference: {item.details['reference']}\n"
        f"Answer: {text}\nGrade:"
    )


def is_usable(reply: str) -> bool:
    """Tell whether a reply holds exactly one grade between 0 and 1."""
    return len(_NUMBER.findall(reply)) == 1


def with_reply(row: Row, reply: str) -> Row:
    """Return the row with the judge's grade as its score."""
    (grade,) = _NUMBER.findall(reply)
    return replace(row, score=float(grade), details={**row.details, "judge_reply": reply})


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the mean grade, interval, and the mean over the questions that need each skill."""
    skills = sorted({skill for row in rows for skill in row.details["skills"]})
    by_skill = {
        skill: float(np.mean([row.score for row in rows if skill in row.details["skills"]]))
        for skill in skills
    }
    return {**scoring.summarize_mean(rows, METRIC), "by_skill": by_skill}


def submission(items: Sequence[Item], texts: Texts, data_dir: Path | None = None) -> Files:
    """Return the official prediction file (id -> text) and the judge's prompts."""
    pairs = scoring.answered(items, texts)
    return {
        "mmvet_predictions.json": {item.id: text for item, text in pairs},
        "mmvet_judge_prompts.jsonl": [
            {"id": item.id, "prompt": judge_prompt(item, text)} for item, text in pairs
        ],
    }
