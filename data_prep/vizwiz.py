"""VizWiz's training questions of blind people, one record a question: 20,523.

    python data_prep/vizwiz.py --raw DIR --out DIR

Layout below --raw, its authors' own: Annotations/train.json (or train.json),
train/VizWiz_train_00000000.jpg ...
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
    find_first,
    read_json,
    run,
)
from milora_vl.eval.scoring import SHORT_ANSWER

_HOME = "https://vizwiz.cs.colorado.edu/VizWiz_final"
_WHEN_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def read(raw: Path) -> Iterator[Sample]:
    """Yield the questions, each with the commonest of its ten answers."""
    for one in read_json(find_first(raw, "Annotations/train.json", "train.json")):
        lines = [one["question"], _WHEN_UNANSWERABLE, SHORT_ANSWER]
        answer = commonest(person["answer"] for person in one["answers"])
        record = {"id": Path(one["image"]).stem, "image": f"train/{one['image']}"}
        yield "questions", record | {"conversations": exchanges([("\n".join(lines), answer)])}


OFFICIAL = OfficialSet(
    name="vizwiz",
    read=read,
    published={"questions": 20_523},
    remotes=(
        Remote(f"{_HOME}/vqa_data/Annotations.zip", "Annotations.zip"),
        Remote(f"{_HOME}/images/train.zip", "train.zip"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(OFFICIAL, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
