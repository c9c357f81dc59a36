"""MME's folders, checked: two yes/no questions on each of 1,187 images.

    python data_prep/mme.py --raw DIR --out DIR

Layout below --raw: MME_Benchmark_release_version, a folder a category.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official_bench import OfficialBench, run

BENCH = OfficialBench(
    name="mme",
    counts=(2_374,),
    note="The images are given by its authors on request.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(BENCH, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
