"""ScienceQA's training questions as lettered exchanges: 12,726, of which 6,218 have an image.

    python data_prep/scienceqa.py --raw DIR --out DIR

Layout below --raw, its authors' own: problems.json, pid_splits.json, images/train/ID/image.png (or
train/ID/image.png).
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official import (
    OfficialSet,
    OfficialSetError,
    Sample,
    exchanges,
    find_first,
    read_json,
    run,
)
from milora_vl.eval.scoring import LETTER_ANSWER, LETTERS, lettered


def read(raw: Path) -> Iterator[Sample]:
    """Yield the questions of the split "train" in its own order."""
    problems = read_json(find_first(raw, "problems.json", "data/scienceqa/problems.json"))
    splits = read_json(find_first(raw, "pid_splits.json", "data/scienceqa/pid_splits.json"))
    folder = find_first(raw, "images/train", "train").relative_to(raw)
    for key in splits["train"]:
        if key not in problems:
            raise OfficialSetError(f"{raw}: pid_splits.json names question {key}, unknown")
        problem = problems[key]
        hint = (problem.get("hint") or "").strip()
        lines = [f"Context: {hint}"] if hint else []
        lines += [problem["question"], *lettered(problem["choices"]), LETTER_ANSWER]
        has_image = bool(problem.get("image"))
        turns = exchanges([("\n".join(lines), LETTERS[problem["answer"]])], has_image)
        record = {"id": key, "conversations": turns}
        if has_image:
            record["image"] = (folder / key / problem["image"]).as_posix()
        yield "with image" if has_image else "text", record


OFFICIAL = OfficialSet(name="scienceqa", read=read, published={"with image": 6_218, "text": 6_508})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(OFFICIAL, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
