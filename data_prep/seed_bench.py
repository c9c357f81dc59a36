"""SEED-Bench's file, checked: lettered questions on images and on frames of videos.

    python data_prep/seed_bench.py --raw DIR --out DIR

Layout below --raw: SEED-Bench.json, SEED-Bench-image/, SEED-Bench-video-image/.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official_bench import OfficialBench, run

BENCH = OfficialBench(
    name="seed",
    counts=(17_990,),
    note="LLaVA shows the middle frame of a video; seed-image asks the image questions alone.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(BENCH, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
