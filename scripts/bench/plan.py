"""Measure what `milora-vl plan` reckons with, and print it beside the plan's own numbers.

    python scripts/bench/plan.py                     decompositions, and a training step of the demo
    python scripts/bench/plan.py --parts start       decompositions alone: needs no data

Rates of the parts are shares of the matrix-product rate, which is measured again beside each of
them in the same process. The demo's data are made by `bash scripts/finetune_llava_milora.sh`.
"""

import argparse
import statistics
import time

import psutil
import torch
from tqdm import tqdm

from milora_vl import attach_milora, plan
from milora_vl.adapter.decompose import Recipe, decompose_layers
from milora_vl.adapter.minor_svd import minor_svd
from milora_vl.config import load_config
from milora_vl.data.dataset import group_by_length
from milora_vl.model.embedded import cached_demo_base
from milora_vl.plan import plan_run
from milora_vl.runtime import autocast, choose_precision, count_layer_shapes
from milora_vl.training.inputs import build_collate, build_dataset, load_conversations, load_model
from milora_vl.training.trainer import token_loss_sum

CONFIG = "configs/demo_cpu.yaml"
SHAPES = ((576, 576), (1536, 576), (4096, 4096))


def measure_layer(layer: torch.nn.Linear, r: int, method: str, rounds: int) -> str:
    """Return one line: seconds, share of the product rate, and what the rest costs a weight."""
    d_out, d_in = layer.weight.shape
    flops = plan.decomposition_flops(plan.LayerShape(d_out, d_in, 1), r, method == "krylov")
    recipe = Recipe(r, "minor", method, 1.0, subtracted=True)
    svd, share, rest = [], [], []
    for _ in range(rounds):
        rate = plan.measure_flops(torch.float32, packed=True)
        started = time.perf_counter()
        minor_svd(layer.weight, r, method)
        between = time.perf_counter()
        list(decompose_layers({"layer": layer}, recipe, progress=False))
        svd.append(between - started)
        share.append(flops / (svd[-1] * rate))
        rest.append(max(time.perf_counter() - between - svd[-1], 0.0))
    median = statistics.median
    return (
        f"{d_out:>6}x{d_in:<5} {r:>4} {method:>7} {median(svd):>8.3f} {median(share):>6.2f} "
        f"{1e9 * median(rest) / (d_out * d_in):>14.1f}"
    )


def measure_start(rounds: int) -> None:
    """Print what decompositions reach, beside what the plan takes."""
    print(f"{'shape':>12} {'r':>4} {'method':>7} {'svd s':>8} {'share':>6} {'rest ns/weight':>14}")
    for d_out, d_in in SHAPES:
        torch.manual_seed(0)
        layer = torch.nn.Linear(d_in, d_out, bias=False)
        for method in ("krylov", "exact"):
            print(measure_layer(layer, 128 if min(d_out, d_in) > 2048 else 32, method, rounds))
    print(
        f"plan takes: krylov {plan.KRYLOV_EFFICIENCY} and {plan.KRYLOV_SECONDS} s a layer, exact "
        f"{plan.EXACT_EFFICIENCY}, rest "
        f"{1e9 * plan.VALUE_SECONDS:.1f} ns a weight"
    )


def measure_training(rounds: int) -> None:
    """Print seconds and memory of the demo's training step beside the plan's."""
    config = load_config(CONFIG)
    planned = plan_run(config)
    base = cached_demo_base(config.model.image_size_px, config.model.vision_feature_layer)
    vlm = load_model(config.model, base)
    conversations = load_conversations(config.data, config.data.train[0])
    dataset = build_dataset(vlm, config.data, conversations)
    size = config.training["per_device_train_batch_size"]
    order = group_by_length(dataset.lengths, dataset.has_image, size, seed=0)
    collate = build_collate(vlm)
    model, certificate = attach_milora(vlm.model, config.adapter, progress=False)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    shapes = count_layer_shapes(vlm.model)
    precision = choose_precision(config.training["bf16"], lambda: shapes, "cpu")
    resident: list[int] = []

    def step(number: int) -> int:
        batch = collate([dataset[index] for index in order[number * size : (number + 1) * size]])
        with autocast("cpu", precision.dtype):
            loss_sum, n_tokens = token_loss_sum(model, batch)
        resident.append(psutil.Process().memory_info().rss)  # all activations are held now
        (loss_sum / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch["input_ids"].numel()

    step(1)  # warms up
    seconds, tokens, rates = [], [], []
    dtype = precision.dtype or torch.float32
    for number in tqdm(range(2, 2 + rounds), desc="steps"):
        rates.append(plan.measure_flops(dtype))
        started = time.perf_counter()
        tokens.append(step(number))
        seconds.append(time.perf_counter() - started)
    mean, rate = statistics.mean(seconds), statistics.median(rates)
    work = planned.step_seconds * plan.CPU_TRAINING_EFFICIENCY * 1e9 * planned.gflops[1]
    print(
        f"trainable parameters: {certificate.trainable_parameters:,} attached, "
        f"{planned.trainable:,} planned"
    )
    print(f"tokens a sample, padded: {statistics.mean(tokens) / size:.0f}; {planned.notes[0]}")
    print(
        f"training step: mean {mean:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}) of {rounds}, "
        f"{sum(tokens) / sum(seconds):.0f} tokens/s; planned {planned.step_seconds:.2f} s"
    )
    print(
        f"share of {rate / 1e9:.0f} GFLOP/s: {work / (mean * rate):.2f}; plan takes "
        f"{plan.CPU_TRAINING_EFFICIENCY}"
    )
    middle, most = statistics.median(resident) / plan.GIB, max(resident) / plan.GIB
    print(
        f"resident memory after a forward pass: median {middle:.2f} GiB, most {most:.2f}; planned "
        f"{planned.training_gib:.2f}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["start", "training"])
    parser.add_argument("--rounds", type=int, default=5, help="of a decomposition")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    options = parser.parse_args()
    parts = options.parts or ["start", "training"]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if "start" in parts:
        measure_start(options.rounds)
    if "training" in parts:
        measure_training(options.steps)


if __name__ == "__main__":
    main()
