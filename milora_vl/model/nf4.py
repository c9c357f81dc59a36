"""NF4 weights: quantized one at a time, so that a model is loaded without its float weights."""

import contextlib
import logging
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer

from milora_vl.model.families import find_family, has_vision
from milora_vl.model.shards import ShardedWeights, checkpoint_folder
from milora_vl.runtime import give_back_memory, one_ahead

logger = logging.getLogger(__name__)

BLOCK_VALUES = 64
PIECE_VALUES = 1 << 18  # quantized at a time: fits a cache
NESTED_BLOCK_VALUES = 256


def build_nf4_config(model: PreTrainedModel, compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return the 4-bit settings of QLoRA: NF4 with double quantization, language model only."""
    from transformers import BitsAndBytesConfig

    language_model = model.get_submodule(find_family(model).language_model)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=parts_outside(model, language_model),
    )


def parts_outside(module: nn.Module, part: nn.Module, prefix: str = "") -> list[str]:
    """Return the full names of the largest submodules that do not hold ``part``."""
    names = []
    for name, child in module.named_children():
        if child is not part and part in child.modules():
            names += parts_outside(child, part, f"{prefix}{name}.")
        elif child is not part:
            names.append(prefix + name)
    return names


def quantize_nf4(weight: Tensor, layer: nn.Module | None = None) -> nn.Parameter:
    """Quantize a weight to NF4 with double quantization, on its device.

    The result equals that of one call of bitsandbytes, bit for bit; it is computed in pieces,
    because that call needs 16 bytes a value for a moment, 0.7 GiB for an 11008 x 4096 matrix.

    Args:
        weight: [d_out, d_in] float32, bfloat16 or float16; dequantized values come in its dtype.
        layer: The ``Linear4bit`` that will hold the result, if any.

    Returns:
        A bitsandbytes ``Params4bit``.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    # allocated before the pieces' short-lived memory, so that they leave no holes between weights
    codes = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    scales, filled, state = [], 0, None
    for piece in weight.detach().reshape(-1).split(PIECE_VALUES):
        packed, state = quantize_4bit(piece, blocksize=BLOCK_VALUES, quant_type="nf4")
        codes[filled : filled + len(packed)] = packed
        filled += len(packed)
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    offset = absmax.mean()
    absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_VALUES)
    whole = QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=state.code,
        blocksize=BLOCK_VALUES,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=offset,
        state2=nested,
    )
    if layer is not None:
        layer.quant_state = whole
    return Params4bit(
        codes,
        requires_grad=False,
        quant_state=whole,
        blocksize=BLOCK_VALUES,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )


def load_nf4(
    path: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, ShardedWeights]:
    """Load a float checkpoint with the linear layers of its language model in NF4.

    Weights are read and quantized one after the other: at no time are two float weights in memory.

    Args:
        path: Hub id or folder.
        config: Of the model, not quantized.
        dtype: Of everything that stays float; "auto" keeps the checkpoint's.
        device: Where the model goes.
        revision: Hub revision.
        options: More arguments of ``from_config``, for example ``attn_implementation``.

    Returns:
        The model in eval mode, and its float weights on disk.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If a parameter is missing in it, or a file is damaged.
    """
    folder = checkpoint_folder(path, revision)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    # bitsandbytes computes in bfloat16 in every model but a float32 one, whose point is precision
    compute = torch.float32 if dtype == torch.float32 else torch.bfloat16
    model_class = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(config, dtype=dtype, **options)
        settings = build_nf4_config(model, compute)
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map=None)
    weights = ShardedWeights(folder, model)
    _fill_(model, weights, dtype, torch.device(device))
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    with contextlib.suppress(OSError):  # not every checkpoint has one
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), weights


def _fill_(
    model: PreTrainedModel, weights: ShardedWeights, dtype: torch.dtype, device: torch.device
) -> None:
    from bitsandbytes.nn import Linear4bit

    names = tqdm(weights, desc="loading in 4 bits", total=len(weights))
    for name, read in zip(names, one_ahead(weights.read, list(weights)), strict=True):
        owner_name, _, short = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        value = read.to(device)
        if isinstance(owner, Linear4bit) and short == "weight":
            owner.weight = quantize_nf4(value.to(dtype), owner)
        else:
            set_module_tensor_to_device(model, name, device, value=value, dtype=dtype)
    give_back_memory()
    model.tie_weights()
    for name, buffer in model.named_buffers():
        if buffer.device != device:
            set_module_tensor_to_device(model, name, device, value=buffer)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"{weights.folder} lacks {len(empty)} parameters of {type(model).__name__}, the first "
            f"is {empty[0]}; is it a checkpoint of another model?"
        )
