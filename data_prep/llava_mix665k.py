"""LLaVA-1.5's finetuning mixture: 665,298 records on images of five collections, and text.

    python data_prep/llava_mix665k.py --raw DIR --out DIR

Layout below --raw, LLaVA's own: llava_v1_5_mix665k.json, coco/train2017, gqa/images,
ocr_vqa/images, textvqa/train_images, vg/VG_100K and vg/VG_100K_2.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official import OfficialSet, Remote, Sample, records_of, run

_TEXT = "text"
_LLAVA = "hf://datasets/liuhaotian/LLaVA-Instruct-150K"


def read(raw: Path) -> Iterator[Sample]:
    """Yield the records by the collection that their image comes from."""
    for record in records_of(raw / "llava_v1_5_mix665k.json"):
        name = record.get("image")
        yield name.split("/")[0] if isinstance(name, str) else _TEXT, record


OFFICIAL = OfficialSet(
    name="llava_mix665k",
    read=read,
    # haotian-liu/LLaVA, issues 657 and 702
    published={
        "coco": 364_100,
        "gqa": 72_140,
        "ocr_vqa": 80_000,
        "textvqa": 21_953,
        "vg": 86_417,
        _TEXT: 40_688,
    },
    remotes=(
        Remote(f"{_LLAVA}/llava_v1_5_mix665k.json", "llava_v1_5_mix665k.json"),
        Remote("http://images.cocodataset.org/zips/train2017.zip", "coco/train2017.zip"),
        Remote(
            "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
            "gqa/images.zip",
        ),
        Remote(
            "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            "textvqa/train_val_images.zip",
        ),
        Remote("https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip", "vg/images.zip"),
        Remote("https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip", "vg/images2.zip"),
    ),
    note=(
        "OCR-VQA has to be fetched with its authors' script: many of its links are dead, and some "
        "files are GIFs under the name of a JPEG. Both are handled here: a file under another "
        "suffix is found, a missing or damaged one leaves its record out, with the reason."
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(OFFICIAL, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
