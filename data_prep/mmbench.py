"""MMBench's file, checked: lettered questions, each in all rotations of its options.

    python data_prep/mmbench.py --raw DIR --out DIR

Layout below --raw: mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv, images inside.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.official_bench import OfficialBench, run

BENCH = OfficialBench(
    name="mmbench",
    counts=(4_377, 4_329),
    note="4,377 rows: the file that LLaVA used; 4,329: the present one.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(BENCH, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
