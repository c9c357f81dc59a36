"""The frozen residual in 4 bits: NF4(W_p), its quantization error, and how that is corrected.

With correction "low_rank" a third, frozen adapter C of rank r corrects part of the error: the layer
computes ``NF4(W_p - C) x + C x + s B A x``. C starts as the largest singular directions of W_p, and
then becomes those of the error of quantizing the rest (the alternation of LoftQ, arXiv 2310.08659,
with the principal start of PiSSA, arXiv 2404.02948; A and B stay in the minor directions). C
belongs to the 4-bit base, not to the adapter: it is computed again from W, A0 and B0 instead of
being saved, and the exported LoRA is the same with or without it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from milora_vl.adapter.certificate import LayerCertificate
from milora_vl.adapter.quantized import unpack_
from milora_vl.adapter.state import CORRECTION, MILORA, MiloraState, anchor_of, factors, lora_layer
from milora_vl.model.nf4 import quantize_nf4
from milora_vl.model.shards import ShardedWeights
from milora_vl.runtime import full_precision, give_back_memory, one_ahead

OVERSAMPLING = 8
POWER_ITERATIONS = 2
ALTERNATIONS = 1


@dataclass(frozen=True)
class NoiseRatios:
    """Errors of one layer in 4 bits, relative to the norm of its weight.

    Attributes:
        quantization: ||NF4(W_p) - W_p|| / ||W||.
        reconstruction: ||W - (what the layer computes at step 0)|| / ||W||.
    """

    quantization: float
    reconstruction: float


def quantize_residual_(
    peft_model: PeftModel,
    state: MiloraState,
    weights: ShardedWeights,
    progress: bool = True,
    adapter_name: str = MILORA,
) -> dict[str, NoiseRatios]:
    """Replace the 4-bit weights of the adapted layers by NF4(W - s B0 A0).

    One float weight at a time is in memory. The result depends on the float weights and the start
    factors alone, so loading a saved adapter gives the same residual.

    Args:
        peft_model: Carries the filled anchor (A0, -B0) on layers in NF4.
        state: Names the layers.
        weights: The original float weights on disk.
        progress: Show a progress bar.
        adapter_name: Whose start is subtracted.

    Returns:
        Full name -> errors.
    """
    noise = {}
    corrected = state.quantization_correction == "low_rank"  # a float base has no error
    if corrected:
        settings = {"r": state.r, "lora_alpha": state.r, "init_lora_weights": False}
        config = LoraConfig(target_modules=list(state.modules), bias="none", **settings)
        peft_model.add_adapter(CORRECTION, config, autocast_adapter_dtype=True)
    bar = tqdm(state.modules, desc="NF4 residual", disable=not progress)
    read = partial(weights.weight_of, dtype=None)
    for name, weight in zip(bar, one_ahead(read, state.modules), strict=True):
        base_layer = lora_layer(peft_model, name).get_base_layer()
        residual = weight.to(base_layer.weight.device, torch.float32, copy=True)  # still W
        norm = float(residual.norm())
        lora_A, negative_lora_B = factors(peft_model, name, anchor_of(adapter_name))
        with full_precision(), torch.no_grad():
            residual.addmm_(negative_lora_B, lora_A, alpha=state.scaling_of(name))  # W_p
            stored = store_nf4_(base_layer, residual)
            lost = left = float(stored.sub_(residual).norm())
            del stored
            if corrected:
                C_A, C_B = factors(peft_model, name, CORRECTION)
                left = correct_(base_layer, residual, C_A.data, C_B.data)
        give_back_memory()
        noise[name] = NoiseRatios(*(x / norm if norm > 0 else 0.0 for x in (lost, left)))
    return noise


def correct_(layer: nn.Module, residual: Tensor, C_A: Tensor, C_B: Tensor) -> float:
    """Store a residual as NF4(W_p - C) and fill the factors of C.

    Args:
        layer: A bitsandbytes ``Linear4bit`` in NF4.
        residual: W_p, [d_out, d_in] float32.
        C_A: [r, d_in] float32, overwritten.
        C_B: [d_out, r] float32, overwritten.

    Returns:
        ||W_p - NF4(W_p - C) - C||.
    """
    C_A[:], C_B[:] = largest_directions(residual, C_A.shape[0])
    for _ in range(ALTERNATIONS):
        lost = residual - store_nf4_(layer, torch.addmm(residual, C_B, C_A, alpha=-1))
        C_A[:], C_B[:] = largest_directions(lost, C_A.shape[0])
    return float(lost.addmm_(C_B, C_A, alpha=-1).norm())


def largest_directions(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return factors [r, d_in] and [d_out, r] of the r largest singular directions, nearly.

    The random start of the method is the same in every process.
    """
    width = min(r + OVERSAMPLING, *matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=width, niter=POWER_ITERATIONS)
    root = S[:r].sqrt()
    return root[:, None] * V[:, :r].T, U[:, :r] * root


def store_nf4_(layer: nn.Module, weight: Tensor) -> Tensor:
    """Put a weight into a 4-bit layer, in the way its present weight is stored.

    Args:
        layer: A bitsandbytes ``Linear4bit`` in NF4.
        weight: [d_out, d_in] float32.

    Returns:
        What the layer now computes with, [d_out, d_in] float32.

    Raises:
        ValueError: If the layer is quantized in another way.
    """
    from bitsandbytes.functional import dequantize_4bit

    unpack_(layer)
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "quant_type", None) != "nf4":
        raise ValueError(
            f"expected a layer in NF4, found {type(layer.weight).__name__}; load the model with "
            "load_vlm(path, quantization='nf4')"
        )
    layer.weight = quantize_nf4(weight.to(state.dtype), layer)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)


def with_errors(
    layers: Iterable[LayerCertificate], noise: Mapping[str, NoiseRatios]
) -> list[LayerCertificate]:
    """Return the layers' certificates with the errors of the quantized residual."""
    return [
        replace(
            layer,
            quantization_error_ratio=noise[layer.name].quantization,
            reconstruction_error_ratio=noise[layer.name].reconstruction,
        )
        for layer in layers
    ]


def noise_warnings(layers: Sequence[LayerCertificate]) -> list[str]:
    """Return a warning if 4-bit noise is larger than the slice the adapter starts from."""
    drowned = [
        layer
        for layer in layers
        if layer.quantization_error_ratio is not None
        and layer.reconstruction_error_ratio > layer.minor_norm_ratio
    ]
    if not drowned:
        return []
    worst = max(drowned, key=lambda x: x.reconstruction_error_ratio / max(x.minor_norm_ratio, 1e-9))
    return [
        f"in {len(drowned)} of {len(layers)} layers 4-bit noise is larger than the slice (worst: "
        f"{worst.name}, {worst.reconstruction_error_ratio:.1e} beside "
        f"{worst.minor_norm_ratio:.1e} of ||W||): there the start is the noise of NF4, not the "
        "pretrained weight. A larger r, adapter.quantization_correction or a bfloat16 base help"
    ]
