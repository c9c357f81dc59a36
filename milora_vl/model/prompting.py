"""How conversations and images are written for a model: prompt style and image tokens."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from PIL import Image
from transformers import LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.images import ImageReader
from milora_vl.data.prompts import (
    PROMPT_STYLES,
    STYLE_NAME,
    ChatTemplate,
    ChatTemplateError,
    PromptStyle,
    derive_style,
    prefix_style,
    probe_conversations,
)
from milora_vl.data.records import Turn
from milora_vl.model.families import Family
from milora_vl.model.load_errors import LoadError

logger = logging.getLogger(__name__)

TOWERS_WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model", "pixtral")


def count_image_tokens(processor: ProcessorMixin) -> int:
    """Return how many image tokens a LLaVA processor inserts for one image.

    Raises:
        LoadError: If the processor lacks the patch size.
    """
    if not getattr(processor, "patch_size", None):
        raise LoadError(
            "the processor has no patch_size, so the number of image tokens is unknown; set "
            "patch_size, num_additional_image_tokens and vision_feature_select_strategy in its "
            "processor_config.json"
        )
    size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    height, width = size["height"], size["width"]
    tokens = (height // processor.patch_size) * (width // processor.patch_size)
    tokens += processor.num_additional_image_tokens
    return tokens - (processor.vision_feature_select_strategy == "default")


def guess_prompt_style(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """Return the name of the prompt style that a LLaVA checkpoint most likely uses.

    ChatML when the chat template says so; its own template when its tokenizer cannot write the end
    token of LLaVA-1.5's ``vicuna_v1``; else that.
    """
    template = str(getattr(processor, "chat_template", None) or "")
    if "<|im_start|>" in template:
        return "chatml"
    end = PROMPT_STYLES["vicuna_v1"].assistant_suffix
    return STYLE_NAME if template and end not in processor.tokenizer.get_vocab() else "vicuna_v1"


def choose_prompt_style(
    name: str | None,
    family: Family,
    model: PreTrainedModel,
    processor: Any,
    day: date | None = None,
) -> PromptStyle | ChatTemplate:
    """Return the prompt style of that name, or the one that the checkpoint was trained with.

    Args:
        name: A name in ``PROMPT_STYLES``; ``chat_template`` for the model's own (PaliGemma's form
            for PaliGemma); None: the same, but for LLaVA's own processor a guess.
        family: The model's row in the table of families.
        model: The model.
        processor: Its processor or tokenizer.
        day: The date for chat templates that write it; None: today.

    Raises:
        LoadError: If the name is unknown, or the template cannot be used and is needed.
    """
    mark = getattr(processor, "image_token", None)
    if family.prefix_prompt and name in (None, STYLE_NAME):
        return prefix_style(processor.tokenizer)
    if name is None and isinstance(processor, LlavaProcessor):
        name = guess_prompt_style(model, processor)
    if name in PROMPT_STYLES:
        style = PROMPT_STYLES[name]
        if family.image_wrap == ("", ""):
            return style
        before, after = family.image_wrap
        return replace(
            style,
            image_frame=(before, f"{after}\n"),
            special_tokens=(*style.special_tokens, *family.image_wrap),
        )
    if name not in (None, STYLE_NAME):
        known = sorted([*PROMPT_STYLES, STYLE_NAME])
        raise LoadError(f"unknown prompt style {name!r}; known: {known}")
    try:
        style = derive_style(processor, mark, day)
        reader = choose_image_reader(processor, family)
        check_template_ids(style, reader or (ImageReader(processor) if mark else None))
        return style
    except ChatTemplateError as error:
        if name is None and not getattr(processor, "chat_template", None):
            logger.warning("no chat template: prompts are written as vicuna_v1")
            return PROMPT_STYLES["vicuna_v1"]
        raise LoadError(
            f"the model's chat template cannot be used: {error}. Choose a prompt_style from "
            f"{', '.join(PROMPT_STYLES)}"
        ) from error


def check_template_ids(style: ChatTemplate, reader: ImageReader | None = None) -> None:
    """Check on conversations of all shapes that our ids equal those of transformers.

    Raises:
        ChatTemplateError: If they differ; the message names the shape and shows both texts.
    """
    tokenizer = getattr(style.processor, "tokenizer", style.processor)
    for name, (turns, prompt) in probe_conversations(reader is not None).items():
        try:
            expected = _stock_ids(style, turns, prompt)
            n_images = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
            counts = reader.expand([_PROBE_SIZE] * n_images) if reader else []
            actual = encode(turns, style, tokenizer, counts, None, prompt).input_ids
        except ValueError as error:
            if "system" in name:  # refused when a record has such a turn
                continue
            raise ChatTemplateError(f"with {name}: {error}") from error
        # transformers may merge an answer's leading spaces with the prompt's line break into one
        # token; here the prompt stays a prefix of what is learned, so the texts have to agree
        if "outer spaces" in name and tokenizer.decode(actual) == tokenizer.decode(expected):
            continue
        # our prompt may end with what the template puts before each answer: an empty think block
        if actual != expected and not (prompt and actual[: len(expected)] == expected):
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(actual, expected, strict=False))
                    if len({*pair}) > 1
                ),
                min(len(actual), len(expected)),
            )
            ours, theirs = (
                tokenizer.decode(ids[max(at - 5, 0) : at + 8]) for ids in (actual, expected)
            )
            raise ChatTemplateError(
                f"with {name} the tokens differ from those of transformers: {ours!r} here, "
                f"{theirs!r} there"
            )


_PROBE_SIZE = (40, 30)


def _stock_ids(style: ChatTemplate, turns: Sequence[Turn], prompt: bool) -> list[int]:
    """Return the ids that transformers' own function gives.

    Raises:
        ChatTemplateError: If it fails.
    """
    image = Image.new("RGB", _PROBE_SIZE)
    messages = []
    for turn in turns:
        content: Any = turn.text
        if style.image_token:
            first, *rest = turn.text.split(IMAGE_TOKEN)
            parts = [first, *(part for text in rest for part in (image, text.removeprefix("\n")))]
            content = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "image": part}
                for part in parts
                if part or len(parts) == 1
            ]
        messages.append({"role": turn.role, "content": content})
    try:
        output = style.processor.apply_chat_template(
            messages,
            chat_template=style.template,
            tokenize=True,
            add_generation_prompt=prompt,
            return_dict=True,
        )
    except Exception as error:  # whatever a template or a processor raises
        raise ChatTemplateError(f"it fails: {error}") from error
    ids = output["input_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return list(ids[0] if isinstance(ids[0], list) else ids)


def choose_image_reader(processor: Any, family: Family) -> ImageReader | None:
    """Return the image reader; None for LLaVA-1.5's own fast way and for text models.

    Raises:
        LoadError: If the processor does not mark images with a token.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        return None
    if family.mean_padding and isinstance(processor, LlavaProcessor):
        return None
    if getattr(processor, "image_token", None) is None:
        raise LoadError(
            f"{type(processor).__name__} has no image token: this architecture does not read "
            "images as part of its prompt, so it cannot be trained on conversations here"
        )
    return ImageReader(processor, family.token_types, family.cross_attention, family.max_images)


def check_image_tokens(model: PreTrainedModel, processor: ProcessorMixin, path: str) -> None:
    """Check that the processor inserts as many image tokens as the tower gives features.

    For LLaVA's processor the number follows from tower and processor; for others the numbers that
    processor and model state are compared. (Otherwise the model's first forward pass checks.)

    Raises:
        LoadError: If the numbers differ; both are named.
    """
    config = model.config
    if not isinstance(processor, LlavaProcessor):
        _check_stated_tokens(config, processor, path)
        return
    vision = config.vision_config
    size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    side_px = size["height"]
    features = (side_px // vision.patch_size) * (size["width"] // vision.patch_size)
    if getattr(config, "vision_feature_select_strategy", "default") == "full":
        features += vision.model_type not in TOWERS_WITHOUT_CLASS_TOKEN  # the class token stays
    tokens = count_image_tokens(processor)
    if tokens != features:
        raise LoadError(
            f"{path}: the processor puts {tokens} image tokens into the prompt, but the vision "
            f"tower gives {features} features for {side_px} px and patch {vision.patch_size}; fix "
            "patch_size, num_additional_image_tokens or vision_feature_select_strategy in "
            "processor_config.json"
        )


def _check_stated_tokens(config: Any, processor: Any, path: str) -> None:
    stated = {
        "mm_tokens_per_image": "image_seq_length",  # Gemma 3
        "image_seq_length": "image_seq_length",  # InternVL
    }
    pairs = [
        (key, getattr(config, key), attribute, getattr(processor, attribute))
        for key, attribute in stated.items()
        if getattr(config, key, None) and getattr(processor, attribute, None)
    ]
    scale, vision = getattr(config, "scale_factor", None), getattr(config, "vision_config", None)
    if scale and getattr(processor, "image_seq_len", None):  # Idefics3, SmolVLM
        features = (vision.image_size // vision.patch_size) ** 2 // scale**2
        pairs.append(("features of a tile", features, "image_seq_len", processor.image_seq_len))
    if config.model_type == "paligemma":
        features = (vision.image_size // vision.patch_size) ** 2
        attribute = "image_seq_length"
        pairs.append(("features of an image", features, attribute, processor.image_seq_length))
    for key, ours, attribute, theirs in pairs:
        if ours != theirs:
            raise LoadError(
                f"{path}: the processor puts {theirs} image tokens into the prompt ({attribute}), "
                f"but the model expects {ours} ({key}); fix {attribute} in processor_config.json"
            )
