"""VQA v2's training questions, one record an image: 443,757 questions on 82,783 COCO images.

    python data_prep/vqav2.py --raw DIR --out DIR

Layout below --raw, its authors' own: v2_OpenEnded_mscoco_train2014_questions.json,
v2_mscoco_train2014_annotations.json, train2014/COCO_train2014_000000000009.jpg ...
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official import (
    OfficialSet,
    OfficialSetError,
    Remote,
    Sample,
    commonest,
    exchanges,
    read_json,
    run,
)
from milora_vl.eval.scoring import SHORT_ANSWER

_HOME = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"


def read(raw: Path) -> Iterator[Sample]:
    """Yield a record for each image, with all its questions and their commonest answers."""
    questions = read_json(raw / "v2_OpenEnded_mscoco_train2014_questions.json")["questions"]
    annotations = read_json(raw / "v2_mscoco_train2014_annotations.json")["annotations"]
    answers = {
        one["question_id"]: one.get("multiple_choice_answer")
        or commonest(person["answer"] for person in one["answers"])
        for one in annotations
    }
    by_image: dict[int, list[tuple[str, str]]] = {}
    for one in questions:
        if one["question_id"] not in answers:
            raise OfficialSetError(f"{raw}: question {one['question_id']} has no annotation")
        pair = (f"{one['question']}\n{SHORT_ANSWER}", answers[one["question_id"]])
        by_image.setdefault(one["image_id"], []).append(pair)
    for image, pairs in by_image.items():
        name = f"train2014/COCO_train2014_{image:012d}.jpg"
        yield "images", {"id": str(image), "image": name, "conversations": exchanges(pairs)}


OFFICIAL = OfficialSet(
    name="vqav2",
    read=read,
    published={"images": 82_783},
    remotes=(
        Remote(f"{_HOME}/v2_Questions_Train_mscoco.zip", "v2_Questions_Train_mscoco.zip"),
        Remote(f"{_HOME}/v2_Annotations_Train_mscoco.zip", "v2_Annotations_Train_mscoco.zip"),
        Remote("http://images.cocodataset.org/zips/train2014.zip", "train2014.zip"),
    ),
    note="The bench's val2014 images are other images; LLaVA's mixture holds part of these.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(OFFICIAL, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
