"""Random LLaVA checkpoints whose sides are multiples of 32, which the 4-bit CPU kernels need."""

from pathlib import Path

import torch
from chat_tokenizers import build_byte_level
from small_models import build_llama
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from milora_vl.model.compose import compose_llava


def build_saved_base(folder: Path, **how: str) -> Path:
    """Write a two-layer LLaVA in float32; ``how`` goes to ``save_pretrained``."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, projection_dim=24, num_hidden_layers=1,
            num_attention_heads=2, image_size=28, patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
        ),
        image_token_id=63,
        vision_feature_layer=-1,
        image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder, **how)
    return folder


def load_float(folder: Path) -> LlavaForConditionalGeneration:
    """Load it as it was saved."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def build_whole_checkpoint(folder: Path) -> Path:
    """Compose a two-layer LLaVA with processor and tokenizer; pictures are 28 px."""
    tokenizer = build_byte_level()
    torch.manual_seed(1)
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2,
            image_size=28, patch_size=14,
        )
    )  # fmt: skip
    language_model = build_llama(
        tokenizer, hidden_size=64, intermediate_size=128, tie_word_embeddings=True
    )
    return compose_llava(
        tower, language_model, tokenizer, folder, image_size_px=28, image_mean=[0.5] * 3,
        image_std=[0.2] * 3, vision_feature_layer=-1,
    )  # fmt: skip
