"""Time the Krylov minor SVD against torch.linalg.svd, alternating, and compare their subspaces.

    python scripts/bench/minor_svd.py                      576x576 and 1536x576, the embedded model
    python scripts/bench/minor_svd.py --large              also 4096x4096 and 11008x4096 (LLaMA-7B)
    python scripts/bench/minor_svd.py --weights model.safetensors --match q_proj,gate_proj

Without --weights the matrices are noise plus strong directions, which is how trained weights look.
One JSON line per matrix goes to standard output.
"""

# ruff: noqa: N806 - U, S, Vh as in the paper
import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from milora_vl.adapter.minor_svd import minor_svd

SMALL = ((576, 576, 32), (1536, 576, 32))
LARGE = ((4096, 4096, 128), (11008, 4096, 128))


def llm_like(d_out: int, d_in: int) -> Tensor:
    """Return a [d_out, d_in] matrix of noise plus directions of decaying strength."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    strong = torch.logspace(1.5, 0, min(d_out, d_in) // 8)
    left = torch.linalg.qr(torch.randn(d_out, len(strong), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(d_in, len(strong), generator=generator)).Q
    return noise + (left * strong) @ right.T


def matrices(arguments: argparse.Namespace) -> Iterator[tuple[str, Tensor, int]]:
    """Yield name, weight and rank of every matrix to measure."""
    if arguments.weights is None:
        for d_out, d_in, r in SMALL + (LARGE if arguments.large else ()):
            yield "synthetic", llm_like(d_out, d_in), arguments.r or r
        return
    wanted = arguments.match.split(",")
    with safe_open(arguments.weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name.endswith("weight") and any(part in name for part in wanted):
                yield name, file.get_tensor(name).float(), arguments.r or 32


def measure(weight: Tensor, r: int, repeats: int) -> dict[str, object]:
    """Time both methods in turn, so that other load on the machine hits both alike."""
    seconds: dict[str, list[float]] = {"exact": [], "krylov": []}
    results = {}
    for _ in range(repeats):
        for method, times in seconds.items():
            if weight.is_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            results[method] = minor_svd(weight, r, method=method)
            if weight.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    (U, S, Vh), (U_krylov, S_krylov, Vh_krylov) = results["exact"], results["krylov"]
    return {
        "seconds_exact": round(statistics.median(seconds["exact"]), 4),
        "seconds_krylov": round(statistics.median(seconds["krylov"]), 4),
        "speedup": round(
            statistics.median(seconds["exact"]) / statistics.median(seconds["krylov"]), 2
        ),
        "mean_cos2_right": round(float((Vh @ Vh_krylov.T).square().sum() / r), 6),
        "mean_cos2_left": round(float((U.T @ U_krylov).square().sum() / r), 6),
        "energy_over_minimum": round(float(S_krylov.square().sum() / S.square().sum()), 6),
    }


def main() -> None:
    """Parse the arguments and print one line per matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="add the shapes of a 7B model")
    parser.add_argument("--weights", type=Path, help="a .safetensors file to take weights from")
    parser.add_argument("--match", default="q_proj,down_proj", help="parts of tensor names")
    parser.add_argument("--r", type=int, help="rank; default 32, or 128 for the large shapes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    for name, weight, r in matrices(arguments):
        line = {"name": name, "shape": list(weight.shape), "r": r, "device": arguments.device}
        line |= measure(weight.to(arguments.device), r, arguments.repeats)
        print(json.dumps({**line, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
