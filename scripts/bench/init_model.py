"""Time the initialisation of the demo model: without a cache, and twice with an empty one.

    python scripts/bench/init_model.py                 wall-clock and CPU seconds of each start
    python scripts/bench/init_model.py --workers 1     layers one after another, all threads on each
    python scripts/bench/init_model.py --processes 2   one process with one thread, then two that
                                                       share the layers (gloo), one thread each
    python scripts/bench/init_model.py --digests       GiB/s of hashing a weight of 11008 x 4096

One JSON line a start, or a dtype.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from milora_vl.adapter import attach, decompose
from milora_vl.adapter.fingerprint import digest_of, weight_digests
from milora_vl.config import MiloraConfig
from milora_vl.model.embedded import cached_demo_base


def start(name: str, r: int, *, factor_cache: bool) -> dict[str, object]:
    """Attach an adapter to a newly loaded demo model and return what that took."""
    base = cached_demo_base(112, 9)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = MiloraConfig(r=r, factor_cache=factor_cache)
    if dist.is_initialized():
        dist.barrier()  # loading is not what is timed
    wall, cpu = time.perf_counter(), time.process_time()
    _, certificate = attach.attach_milora(model, config, progress=False)
    return {
        "start": name,
        "layers": len(certificate.layers),
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "threads": torch.get_num_threads(),
    }


def work(rank: int, count: int, port: int, r: int) -> None:
    """Be one of ``count`` processes of one thread that share the layers; the first one prints."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=count)
    line = start(f"no cache, {count} processes", r, factor_cache=False)
    if rank == 0:
        print(json.dumps(line), flush=True)
    dist.destroy_process_group()


def time_digests() -> None:
    """Print how fast a weight of a 7B is hashed, in each dtype; the best of three."""
    weight = torch.randn(11008, 4096)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = weight.to(dtype)
        for form, work in (
            ("as stored", partial(digest_of, values)),
            ("at a start", partial(weight_digests, values)),
        ):
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begun)
            rate = values.numel() * values.element_size() / 2**30 / min(seconds)
            line = {"dtype": str(dtype).removeprefix("torch."), "form": form}
            print(json.dumps({**line, "seconds": round(min(seconds), 3), "GiB_s": round(rate, 2)}))


def main() -> None:
    """Parse the arguments and print one line per start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument(
        "--workers", type=int, help="layers at once; default: as attach_milora does"
    )
    parser.add_argument("--processes", type=int, help="compare one process with that many")
    parser.add_argument("--digests", action="store_true", help="time the hashing of weights only")
    arguments = parser.parse_args()
    if arguments.digests:
        time_digests()
        return
    if arguments.processes:
        for count in (1, arguments.processes, 1, arguments.processes):
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            torch.multiprocessing.spawn(work, (count, port, arguments.r), nprocs=count)
        return
    workers = arguments.workers
    count = (lambda layers: workers) if workers else decompose.count_workers
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(attach, "factors_folder", lambda: Path(folder)),
        patch.object(decompose, "count_workers", count),
    ):
        for name, kept in (("no cache", False), ("first", True), ("second", True)):
            print(json.dumps(start(name, arguments.r, factor_cache=kept)), flush=True)


if __name__ == "__main__":
    main()
