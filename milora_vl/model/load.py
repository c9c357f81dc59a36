"""Hub id or folder -> model, processor and how both are used."""

import logging
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from milora_vl.data.images import ImageReader
from milora_vl.data.prompts import ChatTemplate, PromptStyle
from milora_vl.data.videos import FrameSampling
from milora_vl.model.families import find_family, has_vision
from milora_vl.model.hub import fetch_folder
from milora_vl.model.load_errors import LoadError, check_complete, explain, explained_memory
from milora_vl.model.nf4 import load_nf4
from milora_vl.model.prompting import (
    check_image_tokens,
    choose_image_reader,
    choose_prompt_style,
    count_image_tokens,
)
from milora_vl.model.shards import ShardedWeights
from milora_vl.runtime import resolve_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VLM:
    """A vision-language or causal language model ready for use.

    Attributes:
        model: The transformers model, or a PEFT model around it.
        processor: Its processor: ``.tokenizer`` and ``.image_processor``; of a causal language
            model the tokenizer alone.
        family: The architecture (``config.model_type``).
        path: Where it came from.
        prompt_style: How conversations are written for it.
        image_reader: Reads images through the model's own processor; None where each is one square
            of a fixed number of tokens (LLaVA-1.5), and for a causal language model.
        float_weights: The float weights on disk of a model that was quantized while loading.
        pad_to_square: Whether images of LLaVA-1.5 are padded with the mean color, see
            ``DataSection.pad_to_square``; an adapter's own choice once it is loaded.
        video_sampling: Which frames of a video are shown; as an adapter saw them once it is loaded.
    """

    model: Any
    processor: ProcessorMixin | PreTrainedTokenizerBase
    family: str
    path: str
    prompt_style: PromptStyle | ChatTemplate
    image_reader: ImageReader | None = None
    float_weights: ShardedWeights | None = None
    pad_to_square: bool = True
    video_sampling: FrameSampling = field(default_factory=FrameSampling)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def has_vision(self) -> bool:
        """Whether the model takes images at all."""
        return self.tokenizer is not self.processor

    @property
    def tokens_per_image(self) -> int:
        """Image tokens that one image takes in the prompt; 0 where that is not one number."""
        return (
            count_image_tokens(self.processor) if self.has_vision and not self.image_reader else 0
        )

    def with_model(self, model: Any) -> "VLM":
        """Return the same with another model, for instance the one that carries an adapter."""
        return replace(self, model=model)


def _check_quantizable(path: str, stored_quantized: bool, allow_pickle: bool) -> None:
    if stored_quantized:
        raise LoadError(
            f"{path} is stored quantized, without float weights; leave quantization=None "
            "(the adapter then uses residual='anchor'), or give the float checkpoint"
        )
    if allow_pickle:
        raise LoadError(
            f"{path}: quantization='nf4' reads only safetensors, so allow_pickle has no effect. "
            "Remove it; if the checkpoint holds pickles, load it once with allow_pickle and "
            "without quantization, and save it with save_pretrained"
        )


def load_vlm(  # noqa: PLR0913  all but the path by keyword
    path: Path | str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    quantization: Literal["nf4"] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    prompt_style: str | None = None,
    prompt_day: date | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> VLM:
    """Load a vision-language or causal language model from a hub id or a folder.

    Args:
        path: Hub id (``llava-hf/llava-1.5-7b-hf``) or checkpoint folder.
        dtype: Dtype of the weights in memory; "auto" keeps the checkpoint's.
        device: "cpu", "cuda", "cuda:1", ... or "auto".
        quantization: "nf4" brings the language model's linears to 4 bits (bitsandbytes) while it
            reads them; a checkpoint that is quantized already needs None.
        revision: Hub revision.
        attn_implementation: Passed to transformers.
        prompt_style: A name in ``PROMPT_STYLES`` or "chat_template"; None: see
            ``choose_prompt_style``.
        prompt_day: The date for chat templates that write it; None: today.
        trust_remote_code: Run code that comes with the checkpoint.
        allow_pickle: Also read weights that are not safetensors, which can run code; not with
            ``quantization``.

    Raises:
        LoadError: If it cannot be found or read, needs a login, does not fit into memory, is an
            architecture that cannot be adapted, lacks weights, or model and processor disagree on
            the number of image tokens.
    """
    path = str(path)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    fetch_folder(path, ("config.json",), revision=revision)  # says at once that it is nowhere
    try:
        config = AutoConfig.from_pretrained(path, **common)
    except (OSError, ValueError) as error:
        raise explain(path, error, revision) from error
    if getattr(config, "is_decoder", True) is False and not has_vision(config):
        raise LoadError(f"{path}: {config.model_type!r} is no causal language model")
    options: dict[str, Any] = {
        **common,
        "dtype": dtype,
        "use_safetensors": None if allow_pickle else True,
    }
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    place = resolve_device(device)
    takes_images = has_vision(config)
    model_class = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    stored_quantized = getattr(config, "quantization_config", None) is not None
    if quantization:
        _check_quantizable(path, stored_quantized, allow_pickle)
    if stored_quantized or place.type != "cpu":
        # every weight goes straight to its device, not through a whole model in host memory
        options["device_map"] = {"": str(place)}
    weights = None
    try:
        with explained_memory(path):
            if quantization:
                options.pop("use_safetensors")  # nothing else is read
                model, weights = load_nf4(path, config, device=place, **options)
            else:
                model, report = model_class.from_pretrained(
                    path, output_loading_info=True, **options
                )
                check_complete(path, model, report)
        processor = (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(
            path, **common
        )
        family = find_family(model)
        image_reader = choose_image_reader(processor, family)
    except (OSError, ValueError) as error:
        raise explain(path, error, revision) from error
    if takes_images:
        check_image_tokens(model, processor, path)
    style = choose_prompt_style(prompt_style, family, model, processor, prompt_day)
    return VLM(model.eval(), processor, config.model_type, path, style, image_reader, weights)
