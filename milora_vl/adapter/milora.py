"""Attach a MiLoRA adapter to a model: choose layers, decompose, write the factors, certify."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from milora_vl.adapter.certificate import Certificate, LayerCertificate, certify_layer
from milora_vl.adapter.fingerprint import combine_digests, weight_digests
from milora_vl.adapter.minor_svd import full_precision, minor_svd
from milora_vl.adapter.quantize import (
    dense_weight,
    evaluating,
    is_quantised,
    stored_values,
)
from milora_vl.adapter.residual_nf4 import noise_warnings, quantise_residual_, with_errors
from milora_vl.adapter.state import (
    ANCHOR,
    MILORA,
    MiloraState,
    Residual,
    activate,
    add_adapters,
    factors,
    lora_layer,
    remember,
    subtract_anchor_,
)
from milora_vl.adapter.targets import Targets, check_layers, find_targets, resolve_residual
from milora_vl.config import MiloraConfig
from milora_vl.model.shards import ShardedWeights

logger = logging.getLogger(__name__)

GIB = 1024**3


def attach_milora(
    model: PreTrainedModel,
    config: MiloraConfig,
    batch: Mapping[str, Any] | None = None,
    progress: bool = True,
    weights: ShardedWeights | None = None,
) -> tuple[PeftModel, Certificate]:
    """Put a MiLoRA adapter on a model, so that it still computes the same function.

    The model is wrapped in place. It gets two PEFT adapters: ``milora`` (A, B, trainable) and
    ``anchor`` (A0, -B0, frozen; active only with residual "anchor", otherwise kept for saving).
    Everything else is frozen except, if asked for, the projector.

    Args:
        model: LLaVA-style model or causal language model with its weights loaded.
        config: Rank, slice, residual mode and layers.
        batch: Model inputs on the right device; if given, the logits before and after are compared.
        progress: Show a progress bar with rate and remaining time.
        weights: Float weights on disk of a model that ``load_vlm`` quantised
            (``vlm.float_weights``). They are decomposed instead of the quantised ones, one at a
            time, and with residual "subtract" the base becomes NF4(W_p).

    Returns:
        The PEFT model and the init certificate.

    Raises:
        ValueError: If no layer or a wrong layer matches, a weight holds NaN or is too small for r,
            or the residual mode is impossible. The base weights are then unchanged.
    """
    started = time.perf_counter()
    if isinstance(model, PeftModel):
        raise ValueError("the model already carries a PEFT adapter; merge or unload it first")
    targets = find_targets(model, config.target_modules)
    check_layers(model, targets.modules, config.r)
    residual = resolve_residual(model, targets.modules, config.residual, weights is not None)
    log_targets(targets, residual)
    total = sum(parameter.numel() for parameter in model.parameters())
    before = compute_logits(model, batch) if batch is not None else None

    projector = targets.projector if config.train_projector else None
    state = MiloraState(
        r=config.r,
        lora_alpha=float(config.lora_alpha or config.r),
        slice=config.slice,
        svd=config.svd,
        residual=residual,
        lora_dropout=config.lora_dropout,
        modules=targets.modules,
        projector=projector,
        fingerprint={},
        quantization_correction=_correction(config, residual, weights),
    )
    peft_model = add_adapters(model, state)
    try:
        with full_precision():
            layers, digests, peak_bytes = _init_factors(peft_model, state, progress, weights)
    except BaseException:
        peft_model.unload()
        raise
    if residual == "subtract" and weights is not None:
        layers = with_errors(layers, quantise_residual_(peft_model, state, weights, progress))
    elif residual == "subtract":
        subtract_anchor_(peft_model, targets.modules)
    state = MiloraState(**{**vars(state), "fingerprint": combine_digests(digests)})
    remember(peft_model, state)
    activate(peft_model, residual, trainable=True)

    after = compute_logits(peft_model, batch) if batch is not None else None
    cuda = torch.cuda.is_available()
    certificate = Certificate(
        layers=tuple(layers),
        matched={
            "language_model": list(targets.modules),
            "projector": [projector] if projector else [],
        },
        skipped=targets.skipped,
        residual=residual,
        slice=config.slice,
        svd=config.svd,
        r=config.r,
        scaling=state.scaling,
        seconds=time.perf_counter() - started,
        peak_memory_gib=peak_bytes / GIB,
        peak_cuda_memory_gib=torch.cuda.max_memory_allocated() / GIB if cuda else None,
        trainable_parameters=sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
        total_parameters=total,
        **_compare_logits(before, after),
        warnings=_warnings(layers, residual),
    )
    for text in certificate.warnings:
        logger.warning(text)
    return peft_model, certificate


def compute_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits [B, T, V] of one batch in eval mode, on the CPU in float32."""
    with evaluating(model), torch.no_grad():
        return model(**batch).logits.to("cpu", torch.float32)


def log_targets(targets: Targets, residual: Residual) -> None:
    """Log which layers matched and which were left out, and why."""
    kinds = sorted({name.rpartition(".")[2] for name in targets.modules})
    logger.info(
        "adapting %d language-model layers (%s), residual=%s, projector: %s",
        len(targets.modules),
        ", ".join(kinds),
        residual,
        targets.projector or "none",
    )
    for name, reason in targets.skipped.items():
        logger.info("left out %s: %s", name, reason)


def _init_factors(
    peft_model: PeftModel,
    state: MiloraState,
    progress: bool,
    weights: ShardedWeights | None,
) -> tuple[list[LayerCertificate], dict[str, dict[str, str]], int]:
    """Decompose every layer into both adapters; base weights stay as they are."""
    layers, digests, peak_bytes = [], {}, 0
    process = psutil.Process()
    bar = tqdm(state.modules, desc=f"SVD ({state.slice}, r={state.r})", disable=not progress)
    for name in bar:
        base_layer = lora_layer(peft_model, name).get_base_layer()
        if weights is None:
            weight = dense_weight(base_layer)  # [d_out, d_in] float32
            identity = stored_values(base_layer)
        else:
            weight = identity = weights.weight_of(name).to(base_layer.weight.device)
        try:
            triplets = minor_svd(weight, state.r, method=state.svd, slice=state.slice)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error
        lora_A, lora_B = lora_factors(*triplets, scaling=state.scaling)
        _write(factors(peft_model, name, MILORA), lora_A, lora_B)
        _write(factors(peft_model, name, ANCHOR), lora_A, -lora_B)
        digests[name] = weight_digests(identity)
        layers.append(
            certify_layer(
                name,
                weight,
                triplets,
                state.scaling * (lora_B @ lora_A),
                stored_dtype=None if is_quantised(base_layer.weight) else base_layer.weight.dtype,
                subtracted=state.residual == "subtract",
            )
        )
        peak_bytes = max(peak_bytes, process.memory_info().rss)
    return layers, digests, peak_bytes


def lora_factors(U: Tensor, S: Tensor, Vh: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Return lora_A [r, d_in], lora_B [d_out, r]: scaling * lora_B @ lora_A = U diag(S) Vh."""
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root


def _write(target: tuple[Tensor, Tensor], lora_A: Tensor, lora_B: Tensor) -> None:
    target[0].data.copy_(lora_A)
    target[1].data.copy_(lora_B)


def _correction(config: MiloraConfig, residual: Residual, weights: ShardedWeights | None) -> str:
    if config.quantization_correction == "none" or (residual == "subtract" and weights is not None):
        return config.quantization_correction
    raise ValueError(
        f"quantization_correction={config.quantization_correction} corrects a residual in NF4, and "
        "here there is none: load the float checkpoint with quantization 'nf4' and leave residual "
        "at 'auto', or set quantization_correction to 'none'"
    )


def _compare_logits(before: Tensor | None, after: Tensor | None) -> dict[str, float]:
    if before is None or after is None:
        return {}
    difference, largest = float((before - after).abs().max()), float(before.abs().max())
    return {
        "step0_max_abs_logit_difference": difference,
        "step0_max_abs_logit": largest,
        "step0_relative_logit_difference": difference / largest if largest > 0 else 0.0,
    }


def _warnings(layers: Sequence[LayerCertificate], residual: Residual) -> list[str]:
    texts = []
    dead = [layer for layer in layers if layer.zero_directions]
    if dead:
        texts.append(
            f"{len(dead)} layers have singular values of exactly 0 in the slice (first: "
            f"{dead[0].name}, {dead[0].zero_directions} of {dead[0].r}); those directions get no "
            "gradient"
        )
    lossy = [
        layer
        for layer in layers
        if residual == "subtract" and layer.rounding_loss_ratio > 0.1 * layer.minor_norm_ratio
    ]
    if lossy:
        texts.append(
            f"{len(lossy)} layers lose more than a tenth of their slice to the rounding of W_p "
            f"(first: {lossy[0].name}); residual='anchor' loses nothing"
        )
    return texts + noise_warnings(layers)
