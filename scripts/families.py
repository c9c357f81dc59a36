"""Write docs/families.md: what `all-linear` adapts in every class for images and text.

    python scripts/families.py

Every class is built from its default configuration on the meta device: names and shapes, no values.
Its parts keep their first layers only, so shares are those of these layers.
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from milora_vl.adapter.targets import find_targets
from milora_vl.model.families import find_family

PAGE = Path(__file__).resolve().parents[1] / "docs/families.md"
DEPTHS = ("num_hidden_layers", "num_layers", "depth", "n_layer")
LAYERS = 8  # more than the period of any pattern of layers
WHOLE = ("gemma3n",)  # its later layers share keys and values with earlier ones
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TINY_TIMM = {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": {"embed_dim": 192}}
NEEDED: dict[str, dict[str, Any]] = {  # what a default configuration leaves open
    "aya_vision": {"vision_config": {"hidden_size": 32, "num_attention_heads": 2}},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "4/8"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", **TINY_TIMM}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256,
            "indexer_budget": 64, "indexer_compress_ratio": 4,
        }
    },
}  # fmt: skip
# A small random model with a real processor goes from its checkpoint on disk to an answer:
# tests/unit/family_models.py
WHOLE_WAY = (
    "llava", "vipllava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl",
    "qwen3_vl", "qwen3_5", "lfm2_vl", "idefics3", "smolvlm", "paligemma", "gemma3",
    "internvl", "mllama", "aya_vision",
)  # fmt: skip
HEADER = """# Families

What `target_modules: all-linear` adapts in the {total} classes that transformers {version} has
for images and text. `python scripts/families.py` wrote this page from the classes' default
configurations, without weights; `tests/unit/model/test_every_class.py` holds it to them.

{adapted} are adapted. {refused} are refused, none of them for the layout of its layers. {unbuilt}
cannot be built from its default configuration.

* **adapted**: kinds of layers; *(n)*: one weight that holds n projections, each of which starts in
  its own minor slice (`adapter.fused`). **share**: their part of the language model's parameters,
  embeddings not counted. Experts that are kept in one tensor are left out.
* **side by side**: `data.turns: side_by_side` is known to be right.
* **tested**: *whole way*: a small random model loads, encodes images, starts, trains, is saved,
  loaded and answers; *names*: the language model alone is matched, and no layer is passed over
  without a reason.

| model type | adapted | share | side by side | tested |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One class: its line of the table, and whether it is adapted, refused or cannot be built."""

    line: str
    outcome: str


def shorten_(config: PreTrainedConfig) -> None:
    """Leave the first layers of every part, so that building takes no time."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shorten_(value)
        elif name in DEPTHS and isinstance(value, int) and value > LAYERS:
            setattr(config, name, LAYERS)
            for other, entries in list(vars(config).items()):
                if isinstance(entries, list) and len(entries) == value:
                    setattr(config, other, entries[:LAYERS])


def build(kind: str) -> nn.Module | str:
    """Return a model on the meta device, or why its default configuration builds none."""
    try:
        config = CONFIG_MAPPING[kind](**NEEDED.get(kind, {}))
        if kind not in WHOLE:
            shorten_(config)
        with init_empty_weights(include_buffers=False), torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        return f"its default configuration builds no model ({type(error).__name__})"


def row_of(kind: str, model: nn.Module | str) -> Row:
    """Return the row of one class."""
    if isinstance(model, str):
        return Row(f"| `{kind}` | {model} | | | |", "unbuilt")
    try:
        targets = find_targets(model, "all-linear")
    except ValueError as error:
        reason = re.split(r"[;,] (?:so |add |only )", str(error))[0]
        return Row(f"| `{kind}` | refused: {reason} | | | |", "refused")
    family = find_family(model)
    decoder = model.get_submodule(family.language_model)
    embeddings = model.get_input_embeddings()
    adapted = sum(model.get_submodule(name).weight.numel() for name in targets.modules)
    total = sum(p.numel() for p in decoder.parameters())
    if any(module is embeddings for module in decoder.modules()):
        total -= embeddings.weight.numel()
    ends = {}
    for name in targets.modules:
        rows = targets.rows.get(name)
        ends[name.rpartition(".")[2]] = f" ({rows.count})" if rows else ""
    kinds = ", ".join(f"{end}{blocks}" for end, blocks in sorted(ends.items()))
    side = "yes" if family.side_by_side else "no"
    tested = "whole way" if kind in WHOLE_WAY else "names"
    line = f"| `{kind}` | {kinds} | {100 * adapted / total:.0f} % | {side} | {tested} |"
    return Row(line, "adapted")


def page_of(rows: Iterable[Row]) -> str:
    """Return the whole page."""
    rows = list(rows)
    outcomes = [row.outcome for row in rows]
    header = HEADER.format(
        total=len(rows),
        version=transformers_version,
        **{name: outcomes.count(name) for name in ("adapted", "refused", "unbuilt")},
    )
    return header + "\n".join(row.line for row in rows) + "\n"


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    PAGE.write_text(page_of(row_of(kind, build(kind)) for kind in kinds), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
