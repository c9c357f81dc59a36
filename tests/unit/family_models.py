"""Tiny random checkpoints of every family, each with a real processor and tokenizer, built here."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from chat_tokenizers import build_extended
from fused_models import LINEAR_ATTENTION
from llava_like_models import (
    CHATML,
    MROPE,
    TEXT,
    VISION,
    aya_vision,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    pixtral,
    special_ids,
    square,
    vipllava,
)
from own_templates import GEMMA3, MLLAMA, QWEN2_VL, QWEN3_VL, SMOLVLM
from transformers import LlamaConfig, MistralConfig, SiglipVisionConfig


def qwen2_vl(version: str = "2") -> tuple[Any, Any]:
    tokenizer = build_extended()
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    patches = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    text = {**TEXT, **special_ids(tokenizer), "rope_parameters": MROPE}
    if version == "2":
        vision = {"depth": 2, "embed_dim": 24, "num_heads": 2, "hidden_size": 32}
        config = tf.Qwen2VLConfig(vision_config=patches | vision, text_config=text, **ids)
        model_class, processor_class = tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLProcessor
    elif version == "2.5":
        vision = {"depth": 2, "hidden_size": 24, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"intermediate_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
        config = tf.Qwen2_5_VLConfig(vision_config=patches | vision, text_config=text, **ids)
        model_class = tf.Qwen2_5_VLForConditionalGeneration
        processor_class = tf.Qwen2_5_VLProcessor
    elif version == "3.5":
        vision = {"depth": 2, "hidden_size": 24, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"intermediate_size": 32, "num_position_embeddings": 16}
        rope = MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
        text |= {"head_dim": 8, "rope_parameters": rope, **LINEAR_ATTENTION}
        config = tf.Qwen3_5Config(vision_config=patches | vision, text_config=text, **ids)
        model_class, processor_class = tf.Qwen3_5ForConditionalGeneration, tf.Qwen3VLProcessor
    else:
        vision = {"depth": 2, "hidden_size": 24, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"intermediate_size": 32, "deepstack_visual_indexes": [0]}
        vision |= {"num_position_embeddings": 16}
        text |= {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}}
        config = tf.Qwen3VLConfig(vision_config=patches | vision, text_config=text, **ids)
        model_class, processor_class = tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLProcessor
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    videos = tf.Qwen2VLVideoProcessor if version[0] == "2" else tf.Qwen3VLVideoProcessor
    processor = processor_class(
        tf.Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=pixels),
        tokenizer,
        videos(patch_size=14),
        chat_template=QWEN2_VL if version[0] == "2" else QWEN3_VL,
    )
    return model_class(config), processor


def idefics3(smol: bool = False) -> tuple[Any, Any]:
    tokenizer = build_extended()
    vision = VISION | {"image_size": 56}
    shared = {
        "text_config": LlamaConfig(**TEXT, **special_ids(tokenizer)),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
        "scale_factor": 2,
    }
    pictures = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    template = SMOLVLM
    if smol:
        config = tf.SmolVLMConfig(vision_config=vision, **shared)
        processor = tf.SmolVLMProcessor(
            tf.SmolVLMImageProcessor(**pictures),
            tokenizer,
            tf.SmolVLMVideoProcessor(
                size={"longest_edge": 56}, max_image_size={"longest_edge": 56}
            ),
            image_seq_len=4,
            chat_template=template,
        )
        return tf.SmolVLMForConditionalGeneration(config), processor
    config = tf.Idefics3Config(vision_config=vision, **shared)
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessor(**pictures), tokenizer, image_seq_len=4, chat_template=template
    )
    return tf.Idefics3ForConditionalGeneration(config), processor


def lfm2_vl() -> tuple[Any, Any]:
    tokenizer = build_extended()
    marks = ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    vision = {key: value for key, value in VISION.items() if key not in ("image_size",)}
    config = tf.Lfm2VlConfig(
        vision_config=tf.Siglip2VisionConfig(**vision, num_patches=16, vision_use_head=False),
        text_config=tf.Lfm2Config(
            **TEXT, **special_ids(tokenizer), layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
    )  # fmt: skip
    images = tf.Lfm2VlImageProcessor(
        encoder_patch_size=14, do_image_splitting=False, min_image_tokens=1, max_image_tokens=4
    )
    processor = tf.Lfm2VlProcessor(
        images, tokenizer, chat_template=CHATML.replace("IMAGE", "<image>")
    )
    return tf.Lfm2VlForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    tokenizer = build_extended()
    processor = tf.PaliGemmaProcessor(
        tf.SiglipImageProcessor(size=square(28), image_seq_length=4), tokenizer
    )
    text = TEXT | {"head_dim": 8}
    config = tf.PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=tf.GemmaConfig(**text, **special_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    tokenizer = build_extended(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    config = tf.Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(
            **TEXT, **special_ids(tokenizer), head_dim=8, sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size=square(28)), tokenizer, GEMMA3, image_seq_length=4
    )
    return tf.Gemma3ForConditionalGeneration(config), processor


def mllama() -> tuple[Any, Any]:
    tokenizer = build_extended()
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    assert image_id == len(tokenizer) - 1  # Mllama's output layer leaves the image token out
    ids = special_ids(tokenizer) | {"vocab_size": image_id}
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14,
            "max_num_tiles": 4, "intermediate_layers_indices": [0], "vision_output_dim": 48,
        },
        text_config={
            **TEXT, **ids, "num_hidden_layers": 3, "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_id=image_id,
    )  # fmt: skip
    processor = tf.MllamaProcessor(
        tf.MllamaImageProcessor(size=square(28), max_image_tiles=4), tokenizer, MLLAMA
    )
    model = tf.MllamaForConditionalGeneration(config)
    with torch.no_grad():  # zero at the start of pre-training: pictures would change nothing
        for name, parameter in model.named_parameters():
            if name.endswith("_gate") or name.endswith(".gate"):
                parameter.fill_(0.7)
    return model, processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "bakllava": partial(llava, MistralConfig),
    "vipllava": vipllava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": partial(qwen2_vl, "2.5"),
    "qwen3_vl": partial(qwen2_vl, "3"),
    "qwen3_5": partial(qwen2_vl, "3.5"),
    "lfm2_vl": lfm2_vl,
    "idefics3": idefics3,
    "smolvlm": partial(idefics3, smol=True),
    "paligemma": paligemma,
    "gemma3": gemma3,
    "internvl": internvl,
    "mllama": mllama,
    "aya_vision": aya_vision,
    "pixtral": pixtral,
}


def build_checkpoint(name: str, folder: Path) -> Path:
    """Write the tiny checkpoint of one family."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
