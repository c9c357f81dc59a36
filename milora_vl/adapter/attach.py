"""Attach a MiLoRA adapter to a model: choose layers, decompose, write the factors, certify.

Every adapted layer carries two LoRA adapters of rank r, and computes::

            +--> W            frozen -----------------------------+
            |                                                     |
      x ----+--> A  --> B     trains   ("milora")   --- * s ----- + --> W x + s B A x - s B0 A0 x
            |                                                     |
            +--> A0 --> -B0   frozen   ("anchor")   --- * s ------+

A and B start as copies of A0 and B0, whose product s B0 A0 is the minor slice of W, so the layer
starts as W x. With residual "anchor" it runs as drawn. With "subtract" the first and last branch
are one weight, W_p = W - s B0 A0, and the anchor waits on the CPU. In both cases a saved folder
holds one plain LoRA of rank 2r for the original W: lora_A = [A; A0], lora_B = [B, -B0].
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_vl.adapter.baselines import init_baseline, write_start_
from milora_vl.adapter.certificate import Certificate, LayerCertificate
from milora_vl.adapter.decompose import Recipe, decompose_layers
from milora_vl.adapter.experts import stacks_of
from milora_vl.adapter.factor_cache import FactorCache, factors_folder
from milora_vl.adapter.fingerprint import combine_digests
from milora_vl.adapter.nf4 import noise_warnings, quantize_residual_, with_errors
from milora_vl.adapter.quantized import count_parameters, evaluating
from milora_vl.adapter.state import (
    PLAIN_INITS,
    MiloraState,
    Residual,
    activate,
    add_adapters,
    base_layer,
    remember,
    subtract_anchor_,
    unload_,
)
from milora_vl.adapter.targets import (
    QUANTIZED,
    Targets,
    check_layers,
    choose_experts,
    find_targets,
    match_pattern,
    resolve_residual,
)
from milora_vl.config import MiloraConfig
from milora_vl.model.shards import ShardedWeights
from milora_vl.runtime import full_precision

logger = logging.getLogger(__name__)

GIB = 1024**3


def attach_milora(
    model: PreTrainedModel,
    config: MiloraConfig,
    batch: Mapping[str, Any] | None = None,
    progress: bool = True,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    weights: ShardedWeights | None = None,
) -> tuple[PeftModel, Certificate]:
    """Put a MiLoRA adapter on a model, so that it still computes the same function.

    The model is wrapped in place. It gets two PEFT adapters: ``milora`` (A, B, trainable) and
    ``anchor`` (A0, -B0, frozen; active only with residual "anchor", otherwise kept for saving).
    Everything else is frozen except, if asked for, the projector. Other methods than MiLoRA
    (``config.init``) take the same way; those that start from zero have no anchor.

    Args:
        model: LLaVA-style model or causal language model with its weights loaded.
        config: Rank, slice, residual mode and layers.
        batch: Model inputs on the right device; if given, the logits before and after are compared.
        progress: Show a progress bar with rate and remaining time.
        calibration: Model inputs to measure, for init "null_space".
        weights: Float weights on disk of a model that ``load_vlm`` quantized
            (``vlm.float_weights``). They are decomposed instead of the quantized ones, one at a
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
    targets = find_targets(
        model,
        config.target_modules,
        allow_outside=config.allow_outside_language_model,
        fused=config.fused_rows,
    )
    obstacle = config.experts_obstacle or (QUANTIZED if weights is not None else None)
    settings = (config.experts, config.r)
    experts, choice = choose_experts(model, targets, *settings, obstacle=obstacle)
    targets = replace(targets, modules=(*targets.modules, *experts))
    ranks = match_pattern("rank_pattern", config.rank_pattern, targets.modules)
    check_layers(model, targets.modules, config.r, ranks, targets.rows)
    plain = config.init in PLAIN_INITS
    wanted = "anchor" if plain else config.residual
    residual = resolve_residual(model, targets.modules, wanted, weights is not None)
    log_targets(targets, residual)
    if choice:
        logger.info(choice)
    total = count_parameters(model)
    before = compute_logits(model, batch) if batch is not None else None

    projector = targets.projector if config.train_projector else None
    state = MiloraState(
        r=config.r,
        lora_alpha=float(config.lora_alpha or config.r),
        slice=config.spectrum or "none",
        svd=config.svd,
        scale=config.scale,
        residual=residual,
        lora_dropout=config.lora_dropout,
        modules=targets.modules,
        projector=projector,
        fingerprint={},
        init=config.init,
        quantization_correction=_correction(config, residual, weights),
        rank_pattern=ranks,
        alpha_pattern=match_pattern("alpha_pattern", config.alpha_pattern, targets.modules),
        blocks={name: (rows.groups, *rows.sizes) for name, rows in targets.rows.items()},
        experts={
            name: (stack.count, stack.transposed, stack.depth)
            for name, stack in stacks_of(model, experts).items()
        },
    )
    # adapters first: every layer is decomposed straight into its factors, without a second copy
    peft_model = add_adapters(model, state)
    try:
        with full_precision():
            read = _reader(peft_model, weights) if weights is not None else None
            if config.spectrum:
                cache = FactorCache(factors_folder()) if config.factor_cache else None
                layers, digests, peak_bytes = _init_factors(
                    peft_model, state, cache, progress, read
                )
            else:
                layers, digests, peak_bytes = init_baseline(
                    peft_model, state, calibration, progress, read
                )
    except BaseException:  # Ctrl-C too: the caller gets the model back as it was
        unload_(peft_model, [projector])
        raise
    if residual == "subtract" and weights is not None:
        layers = with_errors(layers, quantize_residual_(peft_model, state, weights, progress))
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
        init=config.init,
        scale=config.scale,
        slice=state.slice,
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
    """Log which layers get adapters, and which are skipped and why."""
    kinds = sorted({name.rpartition(".")[2] for name in targets.modules})
    logger.info(
        "adapting %d language-model layers (%s), residual=%s, projector: %s",
        len(targets.modules),
        ", ".join(kinds),
        residual,
        targets.projector or "none",
    )
    for name, reason in targets.skipped.items():
        logger.info("skipped %s: %s", name, reason)


def _init_factors(
    peft_model: PeftModel,
    state: MiloraState,
    cache: FactorCache | None,
    progress: bool,
    read: Callable[[str], Tensor] | None,
) -> tuple[list[LayerCertificate], dict[str, dict[str, str]], int]:
    """Decompose every layer into both adapters; base weights stay as they are."""
    layers = {name: base_layer(peft_model, name) for name in state.modules}
    recipe = Recipe(
        state.r,
        state.slice,
        state.svd,
        state.scaling,
        subtracted=state.residual == "subtract",
        scale=state.scale,
    )
    own = {
        name: replace(
            recipe,
            r=state.rank_pattern.get(name, state.r),
            scaling=state.scaling_of(name),
            rows=state.rows_of(name),
            stack=state.stack_of(name),
        )
        for name in state.modules
    }
    certificates, digests, peak_bytes = {}, {}, 0
    process = psutil.Process()
    for done in decompose_layers(layers, recipe, cache, progress=progress, read=read, own=own):
        write_start_(peft_model, done.name, state, *done.factors)
        digests[done.name] = done.digests
        certificates[done.name] = done.certificate
        peak_bytes = max(peak_bytes, process.memory_info().rss)
    return [certificates[name] for name in state.modules], digests, peak_bytes


def _reader(peft_model: PeftModel, weights: ShardedWeights) -> Callable[[str], Tensor]:
    """Return what reads one float weight from disk, in its dtype there, to where its layer is."""

    def read(name: str) -> Tensor:
        device = base_layer(peft_model, name).weight.device
        return weights.weight_of(name, dtype=None).to(device)

    return read


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
