"""Law of inspection: of every class for pictures and text the language model alone is matched."""

import logging
import re
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from milora_vl.adapter.targets import find_targets, kind_of
from milora_vl.model.families import FAMILIES, find_family, has_vision

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
REASONS = (
    r"keeps the weights of all experts in one tensor",
    r"is an encoder-decoder",
    r"does not predict the next token",
    r"no part of \w+ holds the language model alone",
)


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


def build(kind: str) -> nn.Module:
    try:
        config = CONFIG_MAPPING[kind](**NEEDED.get(kind, {}))
        if kind not in WHOLE:
            shorten_(config)
        with init_empty_weights(include_buffers=False), torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        pytest.skip(f"{kind}: its default configuration builds no model: {str(error)[:200]!r}")


def is_picture_part(model: nn.Module, name: str) -> bool:
    """Whether a module lies in a tower, told by classes and configurations, not by our names."""
    parts = name.split(".")
    seen = [getattr(model.config, key, None) for key in ("vision_config", "audio_config")]
    for end in range(1, len(parts)):
        part = model.get_submodule(".".join(parts[:end]))
        if any(config is not None and getattr(part, "config", None) is config for config in seen):
            return True
        if re.search(r"(Vision|Visual|Audio|QFormer|VQ)(?!\w*Text)", type(part).__name__):
            return "ForC" not in type(part).__name__ and end > 1
    return False


@pytest.mark.parametrize("kind", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_the_language_model_alone_is_matched_or_the_reason_is_told(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(kind)
    skipped: dict[str, str] = {}
    with caplog.at_level(logging.WARNING):
        try:
            targets = find_targets(model, "all-linear")
            modules, skipped, refused = targets.modules, targets.skipped, ""
        except ValueError as error:
            refused = str(error)
            assert any(re.search(reason, refused) for reason in REASONS), refused
            pattern = re.search(r"target_modules='(.*?)'$", refused)
            if not pattern:  # nothing of it can be adapted
                assert kind not in FAMILIES
                return
            modules = find_targets(model, pattern[1].replace("\\\\", "\\")).modules
    family = find_family(model)
    if kind not in FAMILIES and has_vision(model.config):
        assert "by inspection" in caplog.text
    assert all(name.startswith(f"{family.language_model}.") for name in modules)
    assert not [name for name in modules if is_picture_part(model, name)]
    assert model.get_output_embeddings() not in [model.get_submodule(name) for name in modules]
    kinds = {kind_of(name) for name in modules}
    assert kinds == {"attention", "mlp"} or (refused and kinds <= {"attention", "mlp"})
    if refused:
        return
    # every linear of the decoder is matched or its omission is told, and no layer is passed over
    inside = {
        name
        for name, module in model.get_submodule(family.language_model).named_modules()
        if isinstance(module, nn.Linear)
    }
    told = {*modules, *skipped}
    assert {f"{family.language_model}.{name}" for name in inside} == told
    layer = re.compile(r"^(.*?\.\d+)\.")
    numbered = {found[1] for name in told if (found := layer.match(name))}
    assert {layer.match(name)[1] for name in modules} >= {
        name for name in numbered if any(part.startswith("layer") for part in name.split("."))
    }
