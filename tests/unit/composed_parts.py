"""Parts to compose: tiny vision towers and language models, with random weights."""

from pathlib import Path

import torch
from chat_tokenizers import build_byte_level, build_llama_like
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SHAPE = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "initializer_range": 0.2,
}  # fmt: skip


def build_tower(kind: str):
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SHAPE)).eval()
    return SiglipVisionModel(SiglipVisionConfig(**SHAPE, vision_use_head=False)).eval()


def write_language_model(folder: Path, kind: str, tied: bool) -> Path:
    tokenizer = build_byte_level() if kind == "byte_level" else build_llama_like(kind)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=tied, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
