"""GQA's balanced training questions, one record an image: 943,000 questions on 72,140 images.

    python data_prep/gqa.py --raw DIR --out DIR

Layout below --raw, its authors' own: train_balanced_questions.json, images/ID.jpg.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official import (
    OfficialSet,
    Remote,
    Sample,
    exchanges,
    find_first,
    read_json,
    run,
)
from milora_vl.eval.scoring import SHORT_ANSWER

_HOME = "https://downloads.cs.stanford.edu/nlp/data/gqa"


def read(raw: Path) -> Iterator[Sample]:
    """Yield a record for each image, with all its questions and their short answers."""
    names = ("train_balanced_questions.json", "questions1.2/train_balanced_questions.json")
    by_image: dict[str, list[tuple[str, str]]] = {}
    for one in read_json(find_first(raw, *names)).values():
        pair = (f"{one['question']}\n{SHORT_ANSWER}", one["answer"])
        by_image.setdefault(one["imageId"], []).append(pair)
    for image, pairs in by_image.items():
        turns = exchanges(pairs)
        yield "images", {"id": image, "image": f"images/{image}.jpg", "conversations": turns}


OFFICIAL = OfficialSet(
    name="gqa",
    read=read,
    published={"images": 72_140},
    remotes=(
        Remote(f"{_HOME}/questions1.2.zip", "questions1.2.zip"),
        Remote(f"{_HOME}/images.zip", "images.zip"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(OFFICIAL, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
