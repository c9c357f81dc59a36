"""Time one training step of the demo under several attention implementations, alternating.

    python scripts/bench/train_step.py --attention eager sdpa --pictures 4 --rounds 4

Needs the demo's data (`bash scripts/finetune_llava_milora.sh` makes them). Prints the seconds of
forward and backward of one batch, the median of each implementation and the ratio to the first.
"""

import argparse
import statistics
import time

import torch
from tqdm import tqdm

from milora_vl import MiloraConfig, attach_milora
from milora_vl.config import load_config
from milora_vl.model.embedded import cached_demo_base
from milora_vl.runtime import autocast, choose_precision, count_layer_shapes
from milora_vl.training.inputs import build_collate, build_dataset, load_conversations, load_model
from milora_vl.training.trainer import token_loss_sum


def build_step(attention: str, n_pictures: int):
    """Return a function that does one step, the size of its batch, and its precision."""
    overrides = [f"model.attn_implementation={attention}"]
    config = load_config("configs/demo_cpu.yaml", overrides)
    base = cached_demo_base(config.model.image_size_px, config.model.vision_feature_layer)
    vlm = load_model(config.model, base)
    conversations = load_conversations(config.data, config.data.train[0], 200)
    dataset = build_dataset(vlm, config.data, conversations)
    middle = sorted(range(200), key=lambda index: dataset.lengths[index])[100 : 100 + n_pictures]
    batch = build_collate(vlm)([dataset[index] for index in middle])
    model, _ = attach_milora(vlm.model, MiloraConfig(r=config.adapter.r), progress=False)
    model.train()
    shapes = count_layer_shapes(model)
    precision = choose_precision(config.training["bf16"], lambda: shapes, "cpu")

    def step() -> float:
        started = time.perf_counter()
        with autocast("cpu", precision.dtype):
            loss_sum, n_tokens = token_loss_sum(model, batch)
        (loss_sum / n_tokens).backward()
        model.zero_grad()
        return time.perf_counter() - started

    return step, tuple(batch["input_ids"].shape), precision


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"])
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    steps = {name: build_step(name, options.pictures) for name in options.attention}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in tqdm(range(options.rounds + 1), desc="rounds"):
        for name, (step, *_) in steps.items():
            taken = step()
            if round_number:  # the first warms up
                seconds[name].append(taken)
    first = statistics.median(seconds[options.attention[0]])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, (_, shape, precision) in steps.items():
        median = statistics.median(seconds[name])
        print(
            f"{name:<20} {shape[0]} x {shape[1]} tokens  median {median:.2f} s  "
            f"({min(seconds[name]):.2f} to {max(seconds[name]):.2f})  "
            f"{shape[0] * shape[1] / median:.0f} tokens/s  x {median / first:.2f}  "
            f"{precision.dtype or torch.float32} ({precision.reason})"
        )


if __name__ == "__main__":
    main()
