"""Drill at 7B size: make a LLaVA-1.5-7B-shaped checkpoint, attach MiLoRA, train a step, generate.

    python scripts/bench/drill_7b.py make --folder DIR      14 GB of random weights
    python scripts/bench/drill_7b.py nf4 --folder DIR       QMiLoRA: NF4(W_p), r = 128
    python scripts/bench/drill_7b.py anchor --folder DIR    bfloat16 weights, untouched
    python scripts/bench/drill_7b.py make --folder DIR --layers 2    the same with fewer layers

Every phase prints its seconds (wall and CPU) and the peak resident memory of the process so far;
the last line is JSON. The weights are noise plus strong directions: trained weights look like it.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from milora_vl.adapter.attach import attach_milora
from milora_vl.config import MiloraConfig
from milora_vl.model.nf4 import load_nf4
from milora_vl.runtime import peak_memory_gib

GIB = 1024**3
STRONG_DIRECTIONS = 64
HUB_NAMES = (  # as published checkpoints name them
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def build_config(layers: int) -> LlavaConfig:
    """Return the shape of LLaVA-1.5-7B with that many language-model layers."""
    return LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=24,
            num_attention_heads=16, image_size=336, patch_size=14,
        ),
        image_token_id=32000, vision_feature_layer=-2, image_seq_length=576,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
        dtype=torch.bfloat16, architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip


def llm_like(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return bfloat16 values of the size and, for a matrix, the spectrum of trained weights."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    value = torch.empty(shape).normal_(std=0.015, generator=generator)
    if len(shape) == 2 and min(shape) > STRONG_DIRECTIONS:
        strength = torch.logspace(-0.3, -1.5, STRONG_DIRECTIONS)
        left = torch.randn(shape[0], STRONG_DIRECTIONS, generator=generator) / shape[0] ** 0.5
        right = torch.randn(STRONG_DIRECTIONS, shape[1], generator=generator) / shape[1] ** 0.5
        value.addmm_(left * (strength * min(shape) ** 0.5), right)
    return value.bfloat16()


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write the checkpoint, one shard a layer, never holding more than one shard."""
    config = build_config(layers)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        index = name.split(".")[3] if name.startswith("model.language_model.layers.") else "rest"
        shards.setdefault(f"model-{index}.safetensors", []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    generator, places = torch.Generator().manual_seed(0), {}
    for file, names in tqdm(shards.items(), desc="writing shards"):
        tensors = {}
        for name in names:
            published = name
            for module, hub in HUB_NAMES:
                published = (
                    hub + name.removeprefix(module) if name.startswith(module) else published
                )
            tensors[published] = llm_like(model.get_parameter(name).shape, generator)
            places[published] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)


@contextmanager
def phase(name: str, results: dict[str, dict[str, float]]) -> Iterator[None]:
    """Time the block and note the peak memory after it."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    results[name] = {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_rss_gib": round(peak_memory_gib(), 2),
    }
    print(name, results[name], flush=True)


def one_step(model: nn.Module) -> float:
    """Train one step on one picture and 32 tokens with 8-bit AdamW; return the loss."""
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 31000, (1, 32), generator=generator)
    input_ids = torch.cat([torch.full((1, 576), 32000), words], dim=1)  # [1, T]
    labels = input_ids.clone()
    labels[:, :576] = -100
    pixels = torch.randn(1, 3, 336, 336, generator=generator).bfloat16()
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    loss = model(input_ids=input_ids, pixel_values=pixels, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return float(loss)


def drill(arguments: argparse.Namespace) -> dict[str, object]:
    """Run all phases of one variant."""
    results: dict[str, dict[str, float]] = {}
    folder = str(arguments.folder)
    weights = None
    with phase("load", results):
        if arguments.variant == "nf4":
            config = AutoConfig.from_pretrained(folder)
            model, weights = load_nf4(folder, config, dtype=torch.bfloat16)
        else:
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    with phase("attach", results):
        config = MiloraConfig(
            r=arguments.r,
            quantization_correction=arguments.correction,
            factor_cache=arguments.factor_cache,
        )
        peft_model, certificate = attach_milora(model, config, weights=weights)
    print(certificate.summary())
    if not arguments.init_only:
        with phase("train_step", results):
            loss = one_step(peft_model)
        with phase("generate", results), torch.inference_mode():
            peft_model.eval()
            peft_model.gradient_checkpointing_disable()
            words = torch.arange(3, 19)[None]
            peft_model.generate(input_ids=words, max_new_tokens=1, do_sample=False)
        print("loss", loss)
    return {"variant": arguments.variant, "layers": model.config.text_config.num_hidden_layers,
            "r": arguments.r, "residual": certificate.residual, "phases": results,
            "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}  # fmt: skip


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=("make", "nf4", "anchor"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32, help="make: language-model layers")
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--correction", default="none", help="adapter.quantization_correction")
    parser.add_argument(
        "--factor-cache", action="store_true", help="as in training; a second run is then quicker"
    )
    parser.add_argument("--init-only", action="store_true", help="stop after attaching")
    arguments = parser.parse_args()
    if arguments.variant == "make":
        make_checkpoint(arguments.folder, arguments.layers)
    else:
        print(json.dumps(drill(arguments)), flush=True)


if __name__ == "__main__":
    main()
