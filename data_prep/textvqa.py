"""TextVQA's training questions, one record a question: 34,602 on OpenImages pictures.

    python data_prep/textvqa.py --raw DIR --out DIR

Layout below --raw, its authors' own: TextVQA_0.5.1_train.json, train_images/ID.jpg.
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
    commonest,
    exchanges,
    read_json,
    run,
)
from milora_vl.eval.scoring import SHORT_ANSWER

_HOME = "https://dl.fbaipublicfiles.com/textvqa"


def read(raw: Path) -> Iterator[Sample]:
    """Yield the questions, each with the commonest of its ten answers."""
    for one in read_json(raw / "TextVQA_0.5.1_train.json")["data"]:
        pair = (f"{one['question']}\n{SHORT_ANSWER}", commonest(one["answers"]))
        record = {"id": str(one["question_id"]), "image": f"train_images/{one['image_id']}.jpg"}
        yield "questions", record | {"conversations": exchanges([pair])}


OFFICIAL = OfficialSet(
    name="textvqa",
    read=read,
    published={"questions": 34_602},
    remotes=(
        Remote(f"{_HOME}/data/TextVQA_0.5.1_train.json", "TextVQA_0.5.1_train.json"),
        Remote(f"{_HOME}/images/train_val_images.zip", "train_val_images.zip"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(OFFICIAL, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
