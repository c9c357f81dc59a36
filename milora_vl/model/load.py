"""Hub id or folder -> model, processor and what the rest needs to know about them."""

import logging
from dataclasses import dataclass, replace
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

from milora_vl.data.pictures import ProcessorPictures
from milora_vl.data.prompts import PromptStyle
from milora_vl.model.families import FAMILIES, Family, find_family, has_vision
from milora_vl.model.load_errors import LoadError, explain, explained_memory
from milora_vl.model.prompting import (
    check_image_tokens,
    choose_prompt_style,
    count_image_tokens,
    read_pictures_by,
)

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
        pictures: How pictures are read; None where each is one square of a fixed number of tokens
            (LLaVA-1.5), and for a causal language model.
    """

    model: Any
    processor: ProcessorMixin | PreTrainedTokenizerBase
    family: str
    path: str
    prompt_style: PromptStyle
    pictures: ProcessorPictures | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures at all."""
        return self.tokenizer is not self.processor

    @property
    def tokens_per_image(self) -> int:
        """Image tokens that one picture takes in the prompt; 0 where that is not one number."""
        return count_image_tokens(self.processor) if self.sees and not self.pictures else 0

    def with_model(self, model: Any) -> "VLM":
        """Return the same with another model, for instance the one that carries an adapter."""
        return replace(self, model=model)


def resolve_device(device: str) -> torch.device:
    """Turn "auto" into CUDA when there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def load_vlm(  # noqa: PLR0913  all but the path by keyword
    path: Path | str,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    quantization: Literal["nf4"] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    prompt_style: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> VLM:
    """Load a vision-language or causal language model from a hub id or a folder.

    Args:
        path: Hub id (``llava-hf/llava-1.5-7b-hf``) or checkpoint folder.
        dtype: Dtype of the weights in memory; "auto" keeps the checkpoint's.
        device: "cpu", "cuda", "cuda:1", ... or "auto".
        quantization: "nf4" loads the language model's linears in 4 bits (bitsandbytes).
        revision: Hub revision.
        attn_implementation: Passed to transformers.
        prompt_style: A name in ``PROMPT_STYLES`` or "chat_template"; None: see
            ``choose_prompt_style``.
        trust_remote_code: Run code that comes with the checkpoint.
        allow_pickle: Also read weights that are not safetensors. Pickles can run code.

    Raises:
        LoadError: If it cannot be found or read, needs a login, does not fit into memory, is an
            architecture that cannot be adapted, or model and processor disagree on the number of
            image tokens.
    """
    path = str(path)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
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
    if quantization:
        options["quantization_config"] = build_nf4_config(FAMILIES.get(config.model_type))
        options["device_map"] = {"": str(resolve_device(device))}
    sees = has_vision(config)
    model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        with explained_memory(path):
            model = model_class.from_pretrained(path, **options)
            if not quantization:
                model = model.to(resolve_device(device))
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(path, **common)
        family = find_family(model)
        pictures = read_pictures_by(processor, family)
    except (OSError, ValueError) as error:
        raise explain(path, error, revision) from error
    if sees:
        check_image_tokens(model, processor, path)
    style = choose_prompt_style(prompt_style, family, model, processor)
    return VLM(model.eval(), processor, config.model_type, path, style, pictures)


def build_nf4_config(family: Family | None = None) -> Any:
    """Return the 4-bit settings of QLoRA: NF4, double quantisation, bfloat16 arithmetic.

    Tower, projector and output head are not quantised.
    """
    from transformers import BitsAndBytesConfig

    family = family or Family()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*filter(None, (family.tower, family.projector)), "lm_head"],
    )
