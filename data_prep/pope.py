"""POPE's files, checked: three times 3,000 yes/no questions on 500 COCO images.

    python data_prep/pope.py --raw DIR --out DIR

Layout below --raw: coco_pope_{random,popular,adversarial}.json, and the
images in val2014/.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official_bench import OfficialBench, run

BENCH = OfficialBench(
    name="pope",
    counts=(9_000, 8_910),
    note="8,910: the version that LLaVA used has 2,910 random questions.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(BENCH, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
