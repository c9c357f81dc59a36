"""Fused layers: one minor slice for each projection, or one for the whole matrix?

    python scripts/bench/fused.py              both parts; the first reads the embedded SmolLM2-135M
    python scripts/bench/fused.py --no-smollm2

1. Real weights: q, k, v and gate, up of SmolLM2-135M are stacked by rows. One JSON line a stack and
   choice: the share of each block's energy that the slice takes at equal numbers of directions. The
   slice is what an adapter moves at once, so less is better, and none should be left out.
2. A small random Phi-3 learns one Markov chain in full, then another one with each adapter: largest
   change of a logit at step 0, and the losses on both chains, means over seeds.
"""

import argparse
import copy
import json
from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from milora_vl import MiloraConfig, attach_milora
from milora_vl.adapter.fused import Rows
from milora_vl.adapter.minor_svd import minor_svd

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LENGTH, BATCH = 24, 16


def shares(weight: torch.Tensor, rows: Rows, r: int, choice: str) -> list[float]:
    """Return the share of each block's energy that the slice takes, n r directions in all."""
    if choice == "whole":
        left, values, right = minor_svd(weight, rows.count * r)
        taken = rows.split((left * values) @ right)
    else:
        slices = [minor_svd(block, r) for block in rows.split(weight)]
        taken = [(left * values) @ right for left, values, right in slices]
    whole = [float(block.norm()) ** 2 for block in rows.split(weight)]
    return [float(part.norm()) ** 2 / energy for part, energy in zip(taken, whole, strict=True)]


def measure_energy(r: int) -> None:
    """Print how the slices of real weights share out over the projections."""
    from milora_vl.model.embedded import load_smollm2

    layers = load_smollm2()[0].model.layers
    stacks = {
        "q|k|v": lambda x: [x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj],
        "gate|up": lambda x: [x.mlp.gate_proj, x.mlp.up_proj],
    }
    for name, parts in stacks.items():
        for choice in ("blocks", "whole"):
            found = []
            for layer in list(layers)[::6]:
                weights = [part.weight.detach().float() for part in parts(layer)]
                rows = Rows(1, tuple(len(weight) for weight in weights))
                found.append(shares(torch.cat(weights), rows, r, choice))
            mean = [sum(column) / len(found) for column in zip(*found, strict=True)]
            line = {"stack": name, "fused": choice, "r": r, "energy of each block": mean}
            print(json.dumps(line), flush=True)


def chain(seed: int) -> torch.Tensor:
    """Return the transition probabilities of a Markov chain over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(4 * torch.randn(64, 64, generator=generator), dim=1)


def sample(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return [BATCH, LENGTH] tokens of the chain."""
    tokens = [torch.randint(3, 64, (BATCH,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(probabilities[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, dim=1)


def train(model: Any, probabilities: torch.Tensor, steps: int, rate: float, seed: int) -> None:
    """Train what is trainable."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        ids = sample(probabilities, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: Any, probabilities: torch.Tensor) -> float:
    """Return the loss on tokens not trained on."""
    generator = torch.Generator().manual_seed(999)
    batches = [sample(probabilities, generator) for _ in range(4)]
    return sum(float(model(input_ids=ids, labels=ids).loss) for ids in batches) / len(batches)


def measure_training(r: int, steps: int, seeds: int) -> None:
    """Print what each choice learns and forgets."""
    choices = {
        f"blocks, r={r} each": {"fused": "blocks", "r": r},
        f"whole, r={r}": {"fused": "whole", "r": r},
        f"whole, as many parameters (qkv {3 * r}, gate_up {2 * r})": {
            "fused": "whole",
            "r": r,
            "rank_pattern": {"qkv_proj": 3 * r, "gate_up_proj": 2 * r},
            "alpha_pattern": {"qkv_proj": 3.0 * r, "gate_up_proj": 2.0 * r},
        },
    }
    results: dict[str, list[list[float]]] = {name: [] for name in choices}
    for seed in range(seeds):
        torch.manual_seed(seed)
        base, old, new = Phi3ForCausalLM(Phi3Config(**SIZES)), chain(seed), chain(seed + 100)
        train(base, old, 4 * steps, 3e-3, seed)
        ids = sample(new, torch.Generator().manual_seed(5))
        for name, settings in choices.items():
            model = copy.deepcopy(base)
            before = model(input_ids=ids).logits.detach()
            config = MiloraConfig(lora_alpha=float(r), factor_cache=False, **settings)
            peft_model, _ = attach_milora(model, config, progress=False)
            step0 = float((peft_model(input_ids=ids).logits.detach() - before).abs().max())
            train(peft_model, new, steps, 2e-3, seed)
            results[name].append([step0, loss(peft_model, new), loss(peft_model, old)])
    for name, rows in results.items():
        step0, learned, kept = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        numbers = {"step 0": step0, "loss on the new chain": learned, "on the old one": kept}
        print(json.dumps({"choice": name, **numbers}), flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-smollm2", action="store_true", help="leave real weights out")
    parser.add_argument("--r", type=int, default=32, help="rank on the real weights")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.no_smollm2:
        measure_energy(arguments.r)
    measure_training(4, arguments.steps, arguments.seeds)


if __name__ == "__main__":
    main()
