"""LLaVA-1.5's alignment set: 558,128 captions of LAION, CC and SBU images.

    python data_prep/llava_pretrain_558k.py --raw DIR --out DIR

Layout below --raw: blip_laion_cc_sbu_558k.json, and the unpacked images.zip (00000/, 00001/, ...).
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official import OfficialSet, Remote, Sample, records_of, run

_LLAVA = "hf://datasets/liuhaotian/LLaVA-Pretrain"


def read(raw: Path) -> Iterator[Sample]:
    """Yield all records; they are of one part."""
    for record in records_of(raw / "blip_laion_cc_sbu_558k.json"):
        yield "captions", record


OFFICIAL = OfficialSet(
    name="llava_pretrain_558k",
    read=read,
    published={"captions": 558_128},
    remotes=(
        Remote(f"{_LLAVA}/blip_laion_cc_sbu_558k.json", "blip_laion_cc_sbu_558k.json"),
        Remote(f"{_LLAVA}/images.zip", "images.zip"),
    ),
    note="Give the file to alignment.train, with alignment.prompt_style: plain.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(OFFICIAL, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
