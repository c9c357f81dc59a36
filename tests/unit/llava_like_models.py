"""Tiny random models and real processors of the families that are built like LLaVA."""

from typing import Any

import transformers as tf
from chat_tokenizers import build_extended
from own_templates import INTERNVL, LLAVA_ONEVISION, PIXTRAL
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {% for c in m.content %}{{ c.text }}{% endfor %}</s>{% endif %}{% endfor %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def special_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def llava(text: type = LlamaConfig, template: str | None = None) -> tuple[Any, Any]:
    tokenizer = build_extended()
    config = tf.LlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=24, **VISION),
        text_config=text(**TEXT, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square(28)),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def vipllava() -> tuple[Any, Any]:
    _, processor = llava()
    tokenizer = processor.tokenizer
    config = tf.VipLlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=24, **VISION),
        text_config=LlamaConfig(**TEXT, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-1, -2],
        image_seq_length=4,
    )
    return tf.VipLlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    tokenizer = build_extended()
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = tf.LlavaNextConfig(
        vision_config=CLIPVisionConfig(projection_dim=24, **VISION),
        text_config=MistralConfig(**TEXT, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
    )
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=square(28), image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=INSTRUCT.replace("IMAGE", "<image>\n"),
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    tokenizer = build_extended()
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = tf.LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**TEXT, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=square(28), image_grid_pinpoints=pinpoints),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(size=square(28)),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    tokenizer = build_extended(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = VISION | {"image_size": [56, 56], "patch_size": [14, 14]}
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(
            size=square(56), crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer,
        tf.InternVLVideoProcessor(size=square(56)),
        image_seq_length=4,
        chat_template=INTERNVL,
    )
    return tf.InternVLForConditionalGeneration(config), processor


def aya_vision() -> tuple[Any, Any]:
    tokenizer = build_extended()
    config = tf.AyaVisionConfig(
        vision_config=SiglipVisionConfig(**VISION | {"image_size": 56}),
        text_config=tf.Cohere2Config(**TEXT, **special_ids(tokenizer), sliding_window=64),
        image_token_id=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    processor = tf.AyaVisionProcessor(
        tf.GotOcr2ImageProcessor(
            size=square(56), crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    return tf.AyaVisionForConditionalGeneration(config), processor


def pixtral() -> tuple[Any, Any]:
    tokenizer = build_extended()
    vision = VISION | {"image_size": 56}
    config = tf.LlavaConfig(
        vision_config=tf.PixtralVisionConfig(**vision),
        text_config=MistralConfig(**TEXT, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = tf.PixtralProcessor(
        tf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14),
        tokenizer,
        patch_size=14,
        chat_template=PIXTRAL,
    )
    return tf.LlavaForConditionalGeneration(config), processor
