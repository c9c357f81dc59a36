"""How far a 4-bit model starts from its float model, with and without the correction of NF4.

    python scripts/bench/nf4_start.py                            the embedded model, r = 32
    python scripts/bench/nf4_start.py --model FOLDER --r 128     another checkpoint

For NF4(W) as loaded and for NF4(W_p) + s B0 A0 without and with correction: the weight error per
layer over ||W||, and on some texts the mean KL divergence from the float model in nats a token and
the share of tokens with the same most likely next token. One JSON line each.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.quantized import evaluating
from milora_vl.config import MiloraConfig
from milora_vl.model.embedded import cached_demo_base
from milora_vl.model.nf4 import load_nf4

TEXTS = (
    "The capital of France is Paris. It lies on the river Seine and has two million inhabitants.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + n\n",
    "Name three animals that live in the sea.\nDolphins, sharks and octopuses do.\n",
    "Water boils at 100 degrees Celsius at sea level; on high mountains it boils at less.",
    "Once upon a time there was a girl who lived with her grandmother at the edge of the forest.",
)


def log_probabilities(model: nn.Module, prompts: list[Tensor]) -> list[Tensor]:
    """Return log-probabilities [T, V] in float32 for every prompt."""
    with torch.no_grad(), evaluating(model):
        return [model(input_ids=ids).logits[0].float().log_softmax(-1) for ids in prompts]


def compare(found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Return mean KL in nats a token, mean |difference| of logits' logs, and agreement."""
    kl = torch.cat([(w.exp() * (w - f)).sum(-1) for f, w in zip(found, wanted, strict=True)])
    same = [f.argmax(-1) == w.argmax(-1) for f, w in zip(found, wanted, strict=True)]
    return {
        "kl_nats_per_token": round(float(kl.mean()), 4),
        "kl_median": round(float(kl.median()), 4),
        "same_top_token_ratio": round(float(torch.cat(same).float().mean()), 3),
        "tokens": int(kl.numel()),
    }


def main() -> None:
    """Parse the arguments and print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a LLaVA checkpoint; default: the embedded one")
    parser.add_argument("--r", type=int, default=32)
    arguments = parser.parse_args()
    folder = str(arguments.model or cached_demo_base(112, 9))
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    wanted = log_probabilities(model, prompts)
    del model
    for correction in (None, "none", "low_rank"):
        started = time.process_time()
        model, weights = load_nf4(folder, config, dtype=torch.float32)
        line: dict[str, object] = {"start": "NF4(W)", "r": arguments.r}
        if correction:
            settings = MiloraConfig(r=arguments.r, quantization_correction=correction)
            model, certificate = attach_milora(model, settings, progress=False, weights=weights)
            layers = certificate.layers
            line["start"] = f"NF4(W_p) + s B0 A0, correction {correction}"
            line["error_over_weight"] = mean([x.reconstruction_error_ratio for x in layers])
            line["slice_over_weight"] = mean([x.minor_norm_ratio for x in layers])
            line["drowned_layers"] = sum(
                x.reconstruction_error_ratio > x.minor_norm_ratio for x in layers
            )
        line |= compare(log_probabilities(model, prompts), wanted)
        print(json.dumps(line | {"cpu_seconds": round(time.process_time() - started, 1)}))


def mean(values: list[float]) -> float:
    """Return the mean to four places."""
    return round(sum(values) / len(values), 4)


if __name__ == "__main__":
    main()
