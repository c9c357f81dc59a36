"""Laws of the GGUF files: read back they compute what was trained, and what is unknown is refused.

Nothing here runs llama.cpp; the layout is that of its converter and reader.
"""

import json

import pytest
import torch
from chat_tokenizers import build_byte_level
from gguf import GGUFReader
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.cli import main
from milora_vl.config import MiloraConfig
from milora_vl.export.gguf import GgufError, interleave, separate, text_entries, tokenizer_fields
from milora_vl.model.compose import compose_llava
from milora_vl.model.load import load_vlm

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LANGUAGE = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
}


def make_run(folder, kind):
    """A LLaVA with a CLIP tower and an adapter away from its start."""
    torch.manual_seed(0)
    tokenizer = build_byte_level()
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    model_class, config_class, more = LANGUAGE[kind]
    language = model_class(config_class(vocab_size=len(tokenizer), **SIZES, **ids, **more))
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            **vision, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=24
        )
    )
    compose_llava(
        tower,
        language,
        tokenizer,
        folder / "base",
        image_size_px=28,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.2, 0.2],
        vision_feature_layer=-2,
    )
    vlm = load_vlm(folder / "base")
    peft_model, _ = attach_milora(vlm.model, MiloraConfig(r=4), progress=False)
    for weight in peft_model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    save_adapter(peft_model, folder / "adapter", processor=vlm.processor)
    return folder / "adapter"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_files_hold_what_was_trained(tmp_path, capsys, kind):
    adapter, out = make_run(tmp_path, kind), tmp_path / "out"
    assert main(["export", str(adapter), "--out", str(out), "--form", "gguf"]) == 0
    assert capsys.readouterr().out.count(": ok") == 2  # logits of what was read back
    assert "llama.cpp" in (out / "README.md").read_text()
    text, vision = GGUFReader(out / "model.gguf"), GGUFReader(out / "mmproj.gguf")
    value = lambda reader, key: reader.fields[key].contents()  # noqa: E731
    assert value(text, "general.architecture") == kind
    assert value(text, f"{kind}.attention.head_count_kv") == 2
    assert value(vision, "clip.vision.feature_layer") == [2]
    assert value(vision, "clip.vision.image_mean") == pytest.approx([0.5, 0.4, 0.3])
    names = {tensor.name for tensor in text.tensors}
    assert {"token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"} <= names
    assert ("output.weight" in names) == (kind == "qwen2")  # tied there is no second one
    assert ("blk.0.attn_q.bias" in names) == (kind == "qwen2")
    of_tower = {tensor.name for tensor in vision.tensors}
    assert {"v.class_embd", "v.blk.1.ffn_up.weight", "mm.0.weight", "mm.2.bias"} <= of_tower
    assert not any(name.startswith("v.blk.2.") for name in of_tower)  # beyond the feature layer
    tokenizer = build_byte_level()
    tokens = value(text, "tokenizer.ggml.tokens")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert value(text, "tokenizer.ggml.pre") == "smollm"
    assert value(text, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert len(value(text, "tokenizer.ggml.merges")) > 50
    assert value(text, "tokenizer.ggml.token_type")[tokenizer.eos_token_id] == 3  # control


def test_rotary_pairs_are_moved_as_llama_cpp_reads_them():
    # LlamaModel.permute (conversion/llama.py): each row of a head's second half follows its first
    rows = torch.arange(16.0)[:, None]
    moved = interleave(rows, n_heads=2)
    assert moved.flatten().tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(separate(moved, n_heads=2), rows)


def test_what_llama_cpp_would_not_compute_is_refused_by_name(tiny_checkpoint, tmp_path):
    vlm = load_vlm(tiny_checkpoint)  # its tower is a DINOv2
    model, _ = attach_milora(vlm.model, MiloraConfig(r=4), progress=False)
    save_adapter(model, tmp_path / "adapter", processor=vlm.processor)
    assert main(
        ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "x"), "--form", "gguf"]
    )
    assert not (tmp_path / "x").exists()
    tokenizer = build_byte_level()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    backend = tokenizer.backend_tokenizer.from_str(json.dumps(described))
    with pytest.raises(GgufError, match="splitting is not known"):
        tokenizer_fields(type(tokenizer)(tokenizer_object=backend), 400)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES))
    model.extra = torch.nn.Linear(2, 2)
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(GgufError, match=r"model\.extra\.weight has no place"):
        text_entries(model)
