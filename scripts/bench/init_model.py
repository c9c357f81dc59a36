"""Time the initialisation of the demo model: without a cache, and twice with an empty one.

    python scripts/bench/init_model.py               wall-clock and CPU seconds of each start
    python scripts/bench/init_model.py --workers 1   layers one after another, all threads on each

One JSON line a start.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForImageTextToText

from milora_vl.adapter import decompose, milora
from milora_vl.config import MiloraConfig
from milora_vl.model.embedded import cached_demo_base


def main() -> None:
    """Parse the arguments and print one line per start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument(
        "--workers", type=int, help="layers at once; default: as attach_milora does"
    )
    arguments = parser.parse_args()
    workers = arguments.workers
    count = (lambda layers: workers) if workers else decompose.count_workers
    base = cached_demo_base(112, 9)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(milora, "factors_folder", lambda: Path(folder)),
        patch.object(decompose, "count_workers", count),
    ):
        for start, kept in (("no cache", False), ("first", True), ("second", True)):
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
            config = MiloraConfig(r=arguments.r, factor_cache=kept)
            wall, cpu = time.perf_counter(), time.process_time()
            _, certificate = milora.attach_milora(model, config, progress=False)
            line = {
                "start": start,
                "layers": len(certificate.layers),
                "seconds": round(time.perf_counter() - wall, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "threads": torch.get_num_threads(),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
