"""Hub id or folder -> model, processor and what the rest needs to know about them."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from milora_vl.data.prompts import PROMPT_STYLES, PromptStyle
from milora_vl.model.nf4 import load_nf4
from milora_vl.model.shards import ShardedWeights

logger = logging.getLogger(__name__)

SUPPORTED = ("llava",)


class LoadError(RuntimeError):
    """A model that cannot be loaded; the text says why and what to do."""


@dataclass(frozen=True)
class VLM:
    """A vision-language model ready for use.

    Attributes:
        model: The transformers model, or a PEFT model around it.
        processor: Its processor: ``.tokenizer`` and ``.image_processor``.
        family: The architecture (``config.model_type``).
        path: Where it came from.
        prompt_style: How conversations are written for it.
        float_weights: The float weights on disk of a model that was quantised while loading.
    """

    model: Any
    processor: ProcessorMixin
    family: str
    path: str
    prompt_style: PromptStyle
    float_weights: ShardedWeights | None = None

    @property
    def tokens_per_image(self) -> int:
        """Image tokens that one picture takes in the prompt."""
        return count_image_tokens(self.processor)

    def with_model(self, model: Any) -> "VLM":
        """Return the same with another model, for instance the one that carries an adapter."""
        return replace(self, model=model)


def count_image_tokens(processor: ProcessorMixin) -> int:
    """Compute how many image tokens a LLaVA processor puts in for one picture.

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
    """Name the prompt style that a checkpoint without one in its config most likely uses.

    ChatML when the chat template says so, else LLaVA-1.5's ``vicuna_v1``.
    """
    template = getattr(processor, "chat_template", None) or ""
    return "chatml" if "<|im_start|>" in str(template) else "vicuna_v1"


def resolve_device(device: str) -> torch.device:
    """Turn "auto" into CUDA when there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_vlm(
    path: Path | str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    quantization: Literal["nf4"] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    prompt_style: str | None = None,
    trust_remote_code: bool = False,
) -> VLM:
    """Load a vision-language model from a hub id or a folder.

    Args:
        path: Hub id (``llava-hf/llava-1.5-7b-hf``) or checkpoint folder.
        dtype: Dtype of the weights in memory; "auto" keeps the checkpoint's.
        device: "cpu", "cuda", "cuda:1", ... or "auto".
        quantization: "nf4" brings the language model's linears to 4 bits (bitsandbytes) while it
            reads them; a checkpoint that is quantised already needs None.
        revision: Hub revision.
        attn_implementation: Passed to transformers.
        prompt_style: A name in ``PROMPT_STYLES``; None: guessed from the chat template.
        trust_remote_code: Run code that comes with the checkpoint.

    Raises:
        LoadError: If it cannot be found or read, is no LLaVA-style model, or model and processor
            disagree on the number of image tokens.
    """
    path = str(path)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **common)
    except (OSError, ValueError) as error:
        raise LoadError(_explain_missing(path, error)) from error
    if config.model_type not in SUPPORTED:
        raise LoadError(f"{path}: model type {config.model_type!r} is not one of {SUPPORTED}")
    options: dict[str, Any] = {**common, "dtype": dtype, "use_safetensors": True}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised and quantization:
        raise LoadError(
            f"{path} is stored quantised, its float weights are not there; leave quantization=None "
            "(the adapter then uses residual='anchor'), or give the float checkpoint"
        )
    weights = None
    try:
        if quantization:
            attention = {key: options[key] for key in ("attn_implementation",) if key in options}
            model, weights = load_nf4(
                path,
                config,
                dtype=dtype,
                device=resolve_device(device),
                revision=revision,
                **attention,
            )
        else:
            if quantised:
                options["device_map"] = {"": str(resolve_device(device))}
            model = AutoModelForImageTextToText.from_pretrained(path, **options)
        processor = AutoProcessor.from_pretrained(path, **common)
    except (OSError, ValueError) as error:
        raise LoadError(_explain_missing(path, error)) from error
    if not (quantization or quantised):
        model = model.to(resolve_device(device))
    check_image_tokens(model, processor, path)
    style = prompt_style or guess_prompt_style(model, processor)
    if style not in PROMPT_STYLES:
        raise LoadError(f"unknown prompt style {style!r}; known: {sorted(PROMPT_STYLES)}")
    return VLM(model.eval(), processor, config.model_type, path, PROMPT_STYLES[style], weights)


def check_image_tokens(model: PreTrainedModel, processor: ProcessorMixin, path: str) -> None:
    """Check that the processor puts in as many image tokens as the tower gives features.

    Raises:
        LoadError: If the numbers differ; both are named.
    """
    vision = model.config.vision_config
    size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    side_px = size["height"]
    features = (side_px // vision.patch_size) * (size["width"] // vision.patch_size)
    if model.config.vision_feature_select_strategy == "full":
        features += 1  # the class token stays
    tokens = count_image_tokens(processor)
    if tokens != features:
        raise LoadError(
            f"{path}: the processor puts {tokens} image tokens into the prompt, but the vision "
            f"tower gives {features} features for {side_px} px and patch {vision.patch_size}; fix "
            "patch_size, num_additional_image_tokens or vision_feature_select_strategy in "
            "processor_config.json"
        )


def _explain_missing(path: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    if Path(path).exists():
        return f"{path}: {first}"
    text = str(error).lower()
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"{path}: this model needs a login: run `hf auth login` and accept its terms. {first}"
        )
    return (
        f"{path}: neither a folder here nor found on the hub. Without a network connection, "
        f"download the checkpoint elsewhere and pass its folder. {first}"
    )
