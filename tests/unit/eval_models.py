"""A tiny random LLaVA with a real tokenizer and image processor, and pictures for it."""

import base64
import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from chat_tokenizers import build
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.prompts import PROMPT_STYLES, PromptStyle
from milora_vl.eval.items import ImageSource

SIZE_PX, PATCH_PX = 28, 14


@dataclass(frozen=True)
class TinyVlm:
    model: Any
    processor: LlavaProcessor
    prompt_style: PromptStyle
    path: str = "tiny"

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def with_model(self, model):
        return replace(self, model=model)


def build_vlm(tokenizer_kind="byte_level", style="chatml", tower="clip", seed=0):
    """Two layers, float32; weights large enough that answers depend on everything before them."""
    tokenizer = build(tokenizer_kind)
    shared = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE_PX,
        "patch_size": PATCH_PX,
        "initializer_range": 0.3,
    }
    vision = {
        "clip": lambda: CLIPVisionConfig(intermediate_size=48, projection_dim=24, **shared),
        "dinov2": lambda: Dinov2Config(mlp_ratio=2, **shared),
    }[tower]()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    size = {"height": SIZE_PX, "width": SIZE_PX}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return TinyVlm(model, processor, PROMPT_STYLES[style])


def picture_bytes(seed, size=(40, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture(seed, where="row"):
    return ImageSource(where, encoded=base64.b64encode(picture_bytes(seed)).decode())


def judged(bench, items, texts):
    return [bench.judge(item, text) for item, text in zip(items, texts, strict=True)]
