"""A built StickerVQA folder, read for the tests."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from data_prep.sticker.names import plural
from data_prep.sticker.questions import LETTER_SUFFIX, SHORT_SUFFIX
from data_prep.sticker.sources import Catalogue
from milora_vl.constants import IMAGE_TOKEN

POPE_KINDS = ("random", "popular", "adversarial")
POPE_TEXT = re.compile(r"Is there an? ([a-z -]+) in the image\?")
COUNT_TEXT = re.compile(r"How many ([a-z -]+) are in the picture\?")
WHERE_TEXT = re.compile(r"Where is the ([a-z -]+) compared with the ([a-z -]+)\?")
IS_WHERE_TEXT = re.compile(
    r"Is the ([a-z -]+) (to the left of|to the right of|above|below) the (.+)\?"
)
WHAT_WHERE_TEXT = re.compile(r"What is (to the left of|to the right of|above|below) the (.+)\?")


class BuiltSet:
    """A built folder, read once."""

    def __init__(self, folder: Path, catalogue: Catalogue) -> None:
        self.folder = folder
        self.concepts = {each.name: each for each in catalogue.concepts}
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.train = json.loads((folder / "train.json").read_text())
        self.val = json.loads((folder / "val.json").read_text())
        self.mmbench = pd.read_csv(
            folder / "mmbench.tsv", sep="\t", keep_default_na=False, dtype=str
        )
        self.pope = {
            kind: [
                json.loads(line)
                for line in (folder / "pope" / f"{kind}.jsonl").read_text().splitlines()
            ]
            for kind in POPE_KINDS
        }
        self.vqa_questions = json.loads((folder / "vqa" / "questions.json").read_text())
        self.vqa_annotations = json.loads((folder / "vqa" / "annotations.json").read_text())
        self.bench_objects = json.loads((folder / "bench_objects.json").read_text())
        self.names = {plural(name): name for name in self.manifest["concepts"]}

    def train_turns(self) -> Iterator[tuple[dict, str, str, str]]:
        """Yield (record, kind, question without mark and suffix, answer text)."""
        for record in self.train:
            turns = record["conversations"]
            for kind, ask, reply in zip(record["kinds"], turns[::2], turns[1::2], strict=True):
                question, answer = ask["value"].removeprefix(f"{IMAGE_TOKEN}\n"), reply["value"]
                if question.endswith(LETTER_SUFFIX):
                    lines = question.split("\n")
                    question = lines[0]
                    answer = lines[1 + "ABCD".index(answer)].partition(". ")[2]
                yield record, kind, question.removesuffix(f"\n{SHORT_SUFFIX}"), answer

    def base_rows(self) -> pd.DataFrame:
        """Return the unrotated rows of the MMBench-like file."""
        return self.mmbench[self.mmbench["index"].astype(int) < 1_000_000]
