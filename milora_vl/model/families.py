"""Architecture -> tower, projector, language model, and how images enter the prompt."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from milora_vl.errors import MiloraError

logger = logging.getLogger(__name__)

PROJECTOR_NAMES: tuple[str, ...] = (
    "multi_modal_projector",
    "connector",
    "aligner",
    "mm_projector",
    "projector",
    "vision_projection",
    "image_to_text_projection",
    "language_projection",
    "embed_vision",
    "merger",
)
TOWER_NAMES: tuple[str, ...] = (
    "vision_tower",
    "vision_model",
    "visual",
    "vision_encoder",
    "image_tower",
    "vision_tokenizer",
    "vqmodel",
)

TokenTypes = Literal["none", "mm_token_type_ids", "token_type_ids", "prefix"]


class FamilyError(MiloraError, ValueError):
    """An architecture that cannot be adapted; the text says which part is missing."""


@dataclass(frozen=True)
class Family:
    """Where the parts of an architecture live, and how its images enter the prompt.

    Attributes:
        tower: Full name of the vision tower.
        projector: Full name of the vision-language projector; None if no single module is one.
        language_model: Full name of the language model below the output head.
        image_wrap: Special tokens that the prompt holds around one image, beside those that the
            processor puts in itself.
        token_types: What the model takes for each token: "mm_token_type_ids" and
            "token_type_ids": 1 at image tokens; "prefix": ``token_type_ids`` 0 for the prompt,
            1 from the first answer token on; "none": nothing.
        cross_attention: Images are no tokens: one mark each, read through a mask
            [T, images, tiles], and every sample of a batch has its row of images.
        max_images: Most images of one sample; None for any number.
        prefix_prompt: The prompt is images, BOS, question, line break (PaliGemma).
        side_by_side: Exchanges about one image can be learned side by side: attention is causal
            with one position a token, so that a mask and positions say all.
        mean_padding: Images are padded to a square with the processor's mean color, as LLaVA-1.5
            does; otherwise the processor alone decides.
    """

    tower: str | None = "model.vision_tower"
    projector: str | None = "model.multi_modal_projector"
    language_model: str = "model.language_model"
    image_wrap: tuple[str, str] = ("", "")
    token_types: TokenTypes = "none"
    cross_attention: bool = False
    max_images: int | None = None
    prefix_prompt: bool = False
    mean_padding: bool = False
    side_by_side: bool = False


_QWEN_VL = Family(
    tower="model.visual",
    projector="model.visual.merger",
    image_wrap=("<|vision_start|>", "<|vision_end|>"),
    token_types="mm_token_type_ids",
)
_IDEFICS = Family(
    tower="model.vision_model",
    projector="model.connector",
    language_model="model.text_model",
    side_by_side=True,
)

FAMILIES: dict[str, Family] = {
    "llava": Family(
        mean_padding=True, side_by_side=True
    ),  # LLaVA-1.5, BakLLaVA; Pixtral's processor does not pad
    "vipllava": Family(mean_padding=True, side_by_side=True),
    "llava_next": Family(side_by_side=True),  # LLaVA-1.6: tiles of any resolution
    "llava_onevision": Family(side_by_side=True),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,  # its three deepstack mergers stay frozen
    "qwen3_5": _QWEN_VL,
    "qwen3_5_moe": _QWEN_VL,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "paligemma": Family(token_types="prefix", max_images=1, prefix_prompt=True),
    "gemma3": Family(token_types="token_type_ids"),
    "internvl": Family(side_by_side=True),
    "mllama": Family(tower="model.vision_model", cross_attention=True, side_by_side=True),
    "aya_vision": Family(side_by_side=True),
    "mistral3": Family(side_by_side=True),
}
"""Every tested architecture by ``config.model_type``. A new one is one more row."""


CAUSAL_TEXT: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "olmo2")
"""Text models whose attention is plainly causal; see ``Family.side_by_side``."""


def check_side_by_side(model: PreTrainedModel, max_length: int | None) -> None:
    """Check that a model computes exchanges side by side as it computes each alone.

    Args:
        model: The model, with an adapter or without.
        max_length: Longest sample in tokens; None for no limit.

    Raises:
        FamilyError: If its attention does not follow a mask and positions alone.
    """
    config = model.config
    kind, text = config.model_type, config.get_text_config()
    reason = None
    if not find_family(model).side_by_side:
        reason = (
            f"it is not known to be right for {kind!r} (attention in both directions, positions in "
            "several axes and recurrent layers do not follow a mask of branches)"
        )
    layers = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in layers if layers else window is not None
    if not reason and slides and window and (max_length is None or max_length > window):
        reason = (
            f"its attention slides over {window} tokens, which a mask of branches does not; set "
            f"data.max_length to {window} or less"
        )
    if reason:
        raise FamilyError(f"data.turns: side_by_side cannot be used: {reason}; or use running")


def has_vision(config: PreTrainedConfig) -> bool:
    """Return whether a configuration describes a model that reads images."""
    kind = config.model_type
    if getattr(config, "vision_config", None) is not None or kind in FAMILIES:
        return True
    vision_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    return vision_class is not None and vision_class != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)


def find_family(model: PreTrainedModel) -> Family:
    """Return the table's row for a model; for others, what inspection finds, with a notice.

    Args:
        model: A vision-language or causal language model. A causal language model has neither
            tower nor projector.

    Raises:
        FamilyError: If the language model cannot be told from the rest.
    """
    config = model.config
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    if "Diffusion" in type(model).__name__ or not model.can_generate():
        raise FamilyError(
            f"{type(model).__name__} does not predict the next token, so it is no language model "
            "in the sense of this package"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise FamilyError(
            f"{config.model_type!r} is an encoder-decoder; only decoder language models are adapted"
        )
    language_model = name_of(model, model.get_decoder())
    if not has_vision(config):
        return Family(
            tower=None,
            projector=None,
            language_model=language_model,
            side_by_side=config.model_type in CAUSAL_TEXT,
        )
    names = [name for name, _ in model.named_modules()]
    tower = _first_named(names, TOWER_NAMES)
    projector = _first_named(names, PROJECTOR_NAMES)
    if not language_model or (tower or "").startswith(f"{language_model}."):
        raise FamilyError(
            f"{config.model_type!r}: no part of {type(model).__name__} holds the language model "
            "alone, so adapters could reach the vision tower; add a row to "
            "milora_vl/model/families.py that says where the parts are"
        )
    logger.warning(
        "model type %r is not in the table of milora_vl/model/families.py; found by inspection: "
        "language model %s, tower %s, projector %s",
        config.model_type,
        language_model,
        tower or "none",
        projector or "none (nothing but the adapter trains)",
    )
    return Family(
        tower=tower,
        projector=projector,
        language_model=language_model,
        token_types=_inspect_token_types(model),
    )


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return the full name of a submodule ("" for the model itself).

    Raises:
        ValueError: If ``wanted`` is not part of ``model``.
    """
    for name, module in model.named_modules():
        if module is wanted:
            return name
    raise ValueError(f"{type(wanted).__name__} is not part of {type(model).__name__}")


def _first_named(names: list[str], wanted: tuple[str, ...]) -> str | None:
    """Return the outermost module of one of the names, the first of these."""
    found = [name for name in names if name.rpartition(".")[2] in wanted]
    return min(found, key=lambda name: name.count("."), default=None)


def _inspect_token_types(model: Any) -> TokenTypes:
    from inspect import signature

    parameters = signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in parameters:
            return name
    return "none"
