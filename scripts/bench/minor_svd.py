"""Time the Krylov minor SVD against torch.linalg.svd, alternating, and compare their subspaces.

    python scripts/bench/minor_svd.py                      576x576 and 1536x576, made up
    python scripts/bench/minor_svd.py --large              also 4096x4096 and 11008x4096 (LLaMA-7B)
    python scripts/bench/minor_svd.py --smollm2            the embedded language model's own weights
    python scripts/bench/minor_svd.py --weights model.safetensors --match q_proj,gate_proj
    python scripts/bench/minor_svd.py --large --cpu-time   CPU seconds of one thread, for a machine
                                                           that does other work at the same time

``floor`` is half a Gram product at the rate of the machine's product, measured in the same run: no
method that forms the Gram matrix can be faster. cos2 and energy are against float64. One JSON line
per matrix goes to standard output.
"""

# ruff: noqa: N806 - U, S, Vh as in the paper
import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from milora_vl.adapter.minor_svd import minor_svd, multiply, pack
from milora_vl.model.embedded import load_smollm2

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
    if arguments.smollm2:
        for name, weight in load_smollm2()[0].named_parameters():
            if any(f"layers.{i}." in name for i in (0, 15, 29)) and name.endswith("proj.weight"):
                yield name, weight.detach(), arguments.r or 32
        return
    if arguments.weights is None:
        for d_out, d_in, r in SMALL + (LARGE if arguments.large else ()):
            yield "synthetic", llm_like(d_out, d_in), arguments.r or r
        return
    wanted = arguments.match.split(",")
    with safe_open(arguments.weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name.endswith("weight") and any(part in name for part in wanted):
                yield name, file.get_tensor(name).float(), arguments.r or 32


def product_rate(clock: Callable[[], float], device: str) -> float:
    """Return the rate of the fastest product, in floating-point operations a second."""
    side = 2048
    packed = pack(torch.randn(side, side, device=device))
    seconds = []
    for _ in range(4):
        started = clock()
        float(multiply(packed, packed)[0, 0])  # waits for the device
        seconds.append(clock() - started)
    return 2 * side**3 / min(seconds)


def measure(
    weight: Tensor, r: int, repeats: int, clock: Callable[[], float], exact64: bool
) -> dict[str, object]:
    """Time both methods in turn, so that other load on the machine hits both alike."""
    seconds: dict[str, list[float]] = {"exact": [], "krylov": []}
    results = {}
    for _ in range(repeats):
        for method, times in seconds.items():
            started = clock()
            results[method] = minor_svd(weight, r, method=method)
            float(results[method][1][0])  # waits for the device
            times.append(clock() - started)
    exact, krylov = (statistics.median(times) for times in seconds.values())
    floor = weight.numel() * min(weight.shape) / product_rate(clock, str(weight.device))
    U_krylov, S_krylov, Vh_krylov = (x.double() for x in results["krylov"])
    if exact64:
        whole = torch.linalg.svd(weight.double(), full_matrices=False)
        U, S, Vh = whole.U[:, -r:], whole.S[-r:], whole.Vh[-r:]
    else:
        U, S, Vh = (x.double() for x in results["exact"])
    return {
        "seconds_exact": round(exact, 4),
        "seconds_krylov": round(krylov, 4),
        "speedup": round(exact / krylov, 2),
        "speedup_of_minima": round(min(seconds["exact"]) / min(seconds["krylov"]), 2),
        "floor_s": round(floor, 4),
        "over_floor": round(krylov / floor, 2),
        "reference": "float64" if exact64 else "float32",
        "mean_cos2_right": round(float((Vh @ Vh_krylov.T).square().sum() / r), 7),
        "mean_cos2_left": round(float((U.T @ U_krylov).square().sum() / r), 7),
        "energy_over_minimum": round(float(S_krylov.square().sum() / S.square().sum()), 7),
    }


def main() -> None:
    """Parse the arguments and print one line per matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="add the shapes of a 7B model")
    parser.add_argument("--smollm2", action="store_true", help="three layers of the embedded model")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread")
    parser.add_argument("--no-float64", action="store_true", help="compare with float32: quicker")
    parser.add_argument("--weights", type=Path, help="a .safetensors file to take weights from")
    parser.add_argument("--match", default="q_proj,down_proj", help="parts of tensor names")
    parser.add_argument("--r", type=int, help="rank; default 32, or 128 for the large shapes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    for name, weight, r in matrices(arguments):
        line = {"name": name, "shape": list(weight.shape), "r": r, "device": arguments.device}
        weight = weight.to(arguments.device)
        line |= measure(weight, r, arguments.repeats, clock, not arguments.no_float64)
        print(json.dumps({**line, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
