"""Vision tower + causal language model -> one plain transformers LLaVA checkpoint."""

from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from milora_vl.constants import IMAGE_TOKEN

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without a system text, image first: the demo model's chat template."""


def compose_llava(  # noqa: PLR0913  all but the three parts and the folder by keyword
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    image_size_px: int,
    image_mean: list[float],
    image_std: list[float],
    vision_feature_layer: int | list[int],
    seed: int = 0,
) -> Path:
    """Write a ``LlavaForConditionalGeneration`` checkpoint and its processor.

    The tower must have one class token before its patches (CLIP, DINOv2); the projector is
    LLaVA's two-layer MLP with GELU, newly initialised from ``seed``.

    Args:
        vision_tower: A transformers vision model returning hidden states [B, 1 + P, D_vision].
        language_model: A causal language model with hidden size D.
        tokenizer: Its tokenizer; the image token is added when it is missing.
        folder: Where the checkpoint goes.
        image_size_px: Side of the square input, a multiple of the tower's patch size.
        image_mean: Channel means the tower was trained with, 0-1.
        image_std: Channel standard deviations the tower was trained with.
        vision_feature_layer: Index or indices into the tower's hidden states.
        seed: Seed of the projector's initial weights.

    Returns:
        ``folder``.

    Raises:
        ValueError: If ``image_size_px`` is no multiple of the patch size.
    """
    patch_size = vision_tower.config.patch_size
    if image_size_px % patch_size:
        raise ValueError(f"image size {image_size_px} px is no multiple of the patch, {patch_size}")
    torch.manual_seed(seed)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(
            len(tokenizer), pad_to_multiple_of=64, mean_resizing=False
        )
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=vision_feature_layer,
        image_seq_length=(image_size_px // patch_size) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = {"height": image_size_px, "width": image_size_px}
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=True,  # LLaVA's rule: a square with the mean colour, the aspect ratio kept
            size={"shortest_edge": image_size_px},
            crop_size=size,
            image_mean=image_mean,
            image_std=image_std,
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
