"""TextVQA: reading text in images, with or without the words that an OCR system found.

Official file: ``TextVQA_0.5.1_val.json``; images are ``train_images/{image_id}.jpg``. LLaVA-1.5's
58.2 is *with* OCR words in the prompt (``textvqa-ocr``), later models' numbers are without.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from milora_vl.eval import scoring
from milora_vl.eval.answers import m4c
from milora_vl.eval.bench_files import (
    Mirror,
    Record,
    find_file,
    image_file,
    locate,
    numbered,
    read_json_object,
    read_mirror,
    reject_duplicates,
)
from milora_vl.eval.items import ImageSource, Item, Row

FILES = "TextVQA_0.5.1_val.json"
VERSION = 1
METRIC = "vqa_accuracy"
MAX_NEW_TOKENS = 16
MIRRORS = (Mirror("textvqa", None, "validation"),)

_FOLDERS = ("textvqa", "TextVQA")
_FILES = ("*TextVQA_0.5.1_val.json", "*TextVQA_0.5.1_test.json")
_OCR_FILES = ("*Rosetta_OCR*val.json", "*textvqa*ocr.jsonl")
_IMAGE_FOLDERS = ("train_images", "test_images", "train_val_images/train_images")
_OCR_LINE = "Reference OCR token: "
_N_ANSWERS = 10
_NO_IMAGES = ("image_id", "flickr_original_url", "flickr_300k_url")

parse = scoring.parse_m4c
judge = scoring.judge_m4c


def load(data_dir: Path | None, *, with_ocr: bool = False) -> list[Item]:
    """Read the questions.

    Args:
        data_dir: Folder of the official file, or that file.
        with_ocr: Put OCR words into the prompts, as LLaVA-1.5 was evaluated. They come from
            ``TextVQA_Rosetta_OCR_*_val.json`` or LLaVA's ``llava_textvqa_val_v051_ocr.jsonl``
            beside the questions.
    """
    if data_dir is None:
        return [
            _item(row, image, ", ".join(row.texts("ocr_tokens")) if with_ocr else None)
            for row, image in read_mirror(MIRRORS, "TextVQA")
        ]
    path = locate(data_dir, _FOLDERS, _FILES, "TextVQA questions")
    ocr_file, words_of = _read_ocr(path) if with_ocr else ("", {})
    items = []
    for row in Record(read_json_object(path), path.name).records("data"):
        row.reject_other_images(_NO_IMAGES, has_image=True)
        image_id = row.text("image_id")
        words = None
        if with_ocr:
            key = (image_id, row.text("question").strip().lower())
            words = words_of.get(key, words_of.get((image_id, None)))
            if words is None:
                raise row.error(f"no OCR words for image {image_id} and its question in {ocr_file}")
        image = image_file(path, _IMAGE_FOLDERS, row, f"{image_id}.jpg")
        items.append(_item(row, image, words))
    reject_duplicates((item.id for item in items), str(path))
    return items


def _read_ocr(questions: Path) -> tuple[str, dict[tuple[str, str | None], str]]:
    """Return the file's name and OCR words by (image, question) or (image, None)."""
    path = find_file(questions.parent, (".",), _OCR_FILES)
    if path is None:
        raise FileNotFoundError(
            f"textvqa-ocr needs the OCR words beside {questions}: TextVQA_Rosetta_OCR_v0.2_val.json"
            " or llava_textvqa_val_v051_ocr.jsonl; without them use textvqa"
        )
    words: dict[tuple[str, str | None], str] = {}
    if path.suffix == ".json":
        for row in Record(read_json_object(path), path.name).records("data"):
            words[row.text("image_id"), None] = ", ".join(row.texts("ocr_tokens"))
        return path.name, words
    for row in numbered(path):
        lines = row.text("text").split("\n")
        if len(lines) != 3 or not lines[1].startswith(_OCR_LINE.strip()):
            raise row.error("question, OCR words and request were expected")
        key = (row.text("question_id"), lines[0].strip().lower())
        words[key] = lines[1][len(_OCR_LINE.strip()) :].strip()
    return path.name, words


def _item(row: Record, image: ImageSource, words: str | None) -> Item:
    question = row.text("question")
    lines = [question, *([] if words is None else [_OCR_LINE + words]), scoring.SHORT_ANSWER]
    answers = row.texts("answers", ())
    if len(answers) not in (0, _N_ANSWERS):
        raise row.error(f"{len(answers)} answers, {_N_ANSWERS} expected")
    return Item(
        id=row.text("question_id"),
        image=image,
        prompt="\n".join(lines),
        answers=answers,
        group=row.text("image_id"),
        category="all",
        question=question,
        details={"question_id": row.get("question_id"), "ocr_words": words},
    )


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return score and interval; ``with_ocr`` says what the prompts held."""
    return {
        **scoring.summarize_mean(rows, METRIC),
        "with_ocr": any(row.details["ocr_words"] is not None for row in rows),
        "empty_rate": 1 - sum(row.well_formed for row in rows) / len(rows),
    }


# what the evaluation server takes
submission = scoring.one_file(
    "textvqa_submission.json",
    lambda item, text: {"question_id": item.details["question_id"], "answer": m4c(text)},
)

VARIANTS = {
    "textvqa-ocr": {
        "FILES": "also TextVQA_Rosetta_OCR_v0.2_val.json",
        "load": partial(load, with_ocr=True),
    },
}
