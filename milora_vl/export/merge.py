"""Turn a model with a MiLoRA adapter into a plain one, or its LoRA into one of smaller rank.

A merge adds the adapter to the weights in float32 and rounds once. The smaller LoRA is the nearest
of its rank (Eckart-Young), and comes with what each layer loses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.adapter.portable import PREFIX
from milora_vl.adapter.quantized import dense_weight, is_quantized
from milora_vl.adapter.state import (
    MiloraState,
    anchor_of,
    base_layer,
    check_not_merged,
    corrections,
    current_adapter,
    factors,
    lora_layer,
    magnitude,
    recall,
    remove_master_weights_,
    trained_projector,
)
from milora_vl.runtime import full_precision, to_float64


@dataclass(frozen=True)
class Truncation:
    """What one layer loses at the smaller rank, in the Frobenius norm.

    Attributes:
        name: Full module name.
        norm: Norm of what the adapter adds to the weight.
        error: Norm of the part that is cut off.
        error_ratio: error / norm; 0 where the adapter adds nothing.
    """

    name: str
    norm: float
    error: float
    error_ratio: float


def recompress(
    lora_A: Tensor, lora_B: Tensor, scaling: float, r: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best factors of rank r of ``scaling * lora_B @ lora_A``, and all singular values.

    The product [d_out, d_in] is never formed: both factors are brought to triangular form, and
    only the small core between them is decomposed (Eckart-Young, in float64).

    Args:
        lora_A: [k, d_in].
        lora_B: [d_out, k].
        scaling: Factor before the product, dimensionless.
        r: Wanted rank, at least 1. Beyond the rank of the product the factors are padded with 0.

    Returns:
        lora_A [r, d_in] and lora_B [d_out, r] in float32, whose product needs no scaling; and the
        singular values of the whole product, descending.
    """
    left = torch.linalg.qr(to_float64(lora_B))  # Q [d_out, k'], R [k', k]
    right = torch.linalg.qr(to_float64(lora_A).T)
    U, S, Vh = torch.linalg.svd(scaling * left.R @ right.R.T, full_matrices=False)
    kept = min(r, S.numel())
    root = S[:kept].sqrt()
    A = lora_A.new_zeros(r, lora_A.shape[1], dtype=torch.float32)
    B = lora_B.new_zeros(lora_B.shape[0], r, dtype=torch.float32)
    A[:kept] = (root[:, None] * (Vh[:kept] @ right.Q.T)).float()
    B[:, :kept] = (left.Q @ (U[:, :kept] * root)).float()
    return A, B, S


def recompress_tensors(
    tensors: dict[str, Tensor], state: MiloraState, r: int
) -> tuple[dict[str, Tensor], MiloraState, list[Truncation]]:
    """Recompress every layer of a portable adapter.

    Args:
        tensors: As ``milora_vl.adapter.portable.portable_tensors`` returns them.
        state: Of the same adapter.
        r: The new rank.

    Returns:
        Tensors and state of a plain LoRA (scaling 1), and what each layer loses.

    Raises:
        ValueError: If r is out of range, or the adapter is a DoRA.
    """
    if state.init == "dora":
        raise ValueError(
            "DoRA also rescales the rows of the weights, which no LoRA of small rank does; export "
            "it as it is (--form lora) or merged (--form merged)"
        )
    if state.experts:
        raise ValueError(
            f"{next(iter(state.experts))} holds all experts in one tensor, whose ranks are not cut "
            "one by one; export it as it is (--form lora) or merged (--form merged)"
        )
    largest = state.widening * max(map(state.rank_of, state.modules))
    if not 1 <= r <= largest:
        raise ValueError(f"--rank {r} is out of range: this adapter has rank {largest}")
    small, losses = dict(tensors), []
    for name in state.modules:
        key_A, key_B = (f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
        A, B, S = recompress(tensors[key_A], tensors[key_B], state.scaling_of(name), r)
        small[key_A], small[key_B] = A.contiguous(), B.contiguous()
        norm, error = float(S.norm()), float(S[r:].norm())
        losses.append(Truncation(name, norm, error, error / norm if norm > 0 else 0.0))
    changes = {"r": r, "lora_alpha": float(r), "init": "lora", "slice": "none"}
    changes |= {"rank_pattern": {}, "alpha_pattern": {}, "blocks": {}}
    return small, MiloraState(**{**vars(state), **changes, "residual": "anchor"}), losses


def truncation_report(losses: Sequence[Truncation], r: int, r_before: int) -> dict[str, Any]:
    """Return the losses of all layers, and of the adapter as a whole, for JSON."""
    norm = sum(loss.norm**2 for loss in losses) ** 0.5
    error = sum(loss.error**2 for loss in losses) ** 0.5
    return {
        "rank": r,
        "rank_before": r_before,
        "norm": norm,
        "error": error,
        "error_ratio": error / norm if norm > 0 else 0.0,
        "layers": [asdict(loss) for loss in losses],
    }


def summarize(report: dict[str, Any]) -> str:
    """Return the report in two lines: the whole adapter, and the layer that loses most."""
    worst = max(report["layers"], key=lambda layer: layer["error_ratio"])
    return (
        f"rank {report['rank_before']} -> {report['rank']}: the cut leaves out "
        f"{100 * report['error_ratio']:.2f} % of what the adapter adds to the weights (Frobenius "
        f"norm {report['error']:.3e} of {report['norm']:.3e})\n"
        f"largest share: {100 * worst['error_ratio']:.2f} % in {worst['name']}"
    )


def merge_adapter(peft_model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into the base weights and return the plain model.

    Every adapted weight becomes W + s (B A - B0 A0), rounded once to its dtype, and the trained
    projector takes its place. The PEFT model is used up: its base is the returned model.

    Args:
        peft_model: From ``attach_milora`` or ``load_adapter``.

    Returns:
        The base model with merged weights; it can be saved with ``save_pretrained``.

    Raises:
        ValueError: If the model has no MiLoRA adapter, its base is quantized, PEFT has merged it
            already, or a merged value does not fit the dtype. The weights are then unchanged.
    """
    state = recall(peft_model)
    check_not_merged(peft_model)
    weights = {name: base_layer(peft_model, name).weight for name in state.modules}
    for name, weight in weights.items():
        if is_quantized(weight):
            raise ValueError(
                f"{name} is quantized ({type(weight).__name__}); a merge would round the adapter "
                "away. Save the adapter, then `milora-vl export --form merged` merges it onto the "
                "original or the dequantized weights"
            )
    adapter_name = current_adapter(peft_model)
    # a pass of checks before any weight changes, so that a refusal leaves the model as it was
    check_merged_values(
        (name, merged_weight(peft_model, name, weight.detach().to(torch.float32, copy=True)), dtype)
        for name, weight in weights.items()
        for dtype in [weight.dtype]
    )
    for name, weight in weights.items():
        merged = merged_weight(peft_model, name, weight.detach().to(torch.float32, copy=True))
        weight.data.copy_(merged)
    if state.projector:
        remove_master_weights_(trained_projector(peft_model, state.projector, adapter_name))
    return peft_model.unload()


def check_merged_values(layers: Iterable[tuple[str, Tensor, torch.dtype]]) -> None:
    """Refuse merged weights with values that their dtype cannot hold.

    float16 ends at 65504, so what a bfloat16 or float32 adapter computes may overflow it.

    Args:
        layers: Full name, merged weight in float32, and the dtype it will be stored in.

    Raises:
        ValueError: With the number of such values and the first layer that has one.
    """
    bad = {}
    for name, merged, dtype in layers:
        if count := int((~torch.isfinite(merged.to(dtype))).sum()):
            bad[name] = (count, dtype)
    if bad:
        first, (_, dtype) = next(iter(bad.items()))
        total = sum(count for count, _ in bad.values())
        raise ValueError(
            f"{total} merged values in {len(bad)} layers are not finite in "
            f"{str(dtype).removeprefix('torch.')} (first: {first}); load the base in bfloat16 or "
            "float32 (--dtype), or check that the adapter did not diverge"
        )


def merged_weight(peft_model: PeftModel, name: str, weight: Tensor) -> Tensor:
    """Return the one weight that does what a layer's weight and its active adapter do together.

    Args:
        peft_model: From ``attach_milora`` or ``load_adapter``.
        name: Full name of an adapted layer.
        weight: [d_out, d_in], float32: what the layer holds; overwritten.

    Returns:
        [d_out, d_in], float32.
    """
    state, adapter_name = recall(peft_model), current_adapter(peft_model)
    adapters = [adapter_name]
    if state.has_anchor and state.residual == "anchor":
        adapters.append(anchor_of(adapter_name))
    adapters += corrections(peft_model)
    with full_precision():
        for adapter in adapters:
            lora_A, lora_B = (factor.detach() for factor in factors(peft_model, name, adapter))
            scaling = lora_layer(peft_model, name).scaling[adapter]
            if stack := state.stack_of(name):
                stack.add_(weight, lora_A, lora_B, scaling)
            else:
                weight.addmm_(lora_B, lora_A, alpha=scaling)
    if state.init == "dora":
        length = magnitude(peft_model, name, adapter_name).detach().to(torch.float32)  # [d_out]
        weight.mul_((length / weight.norm(dim=1))[:, None])
    return weight


def dequantized_model(peft_model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a plain model with the weights of a quantized one and its adapter merged into them.

    Every quantized weight is read as the values it stands for; adapted ones get the adapter added
    before they are rounded to ``dtype``. The PEFT model is used up.

    Args:
        peft_model: From ``attach_milora`` or ``load_adapter`` on a quantized base.
        dtype: Of the returned weights; default: that of the parts that were not quantized.
    """
    check_not_merged(peft_model)
    state, adapter_name = recall(peft_model), current_adapter(peft_model)
    dtype = dtype or peft_model.get_base_model().get_input_embeddings().weight.dtype
    values = {
        name if name in state.experts else f"{name}.weight": merged_weight(
            peft_model, name, dense_weight(base_layer(peft_model, name))
        ).to(dtype)
        for name in state.modules
    }
    check_merged_values((key, value, dtype) for key, value in values.items())
    if state.projector:
        remove_master_weights_(trained_projector(peft_model, state.projector, adapter_name))
    quantized = peft_model.unload()
    for name, layer in quantized.named_modules():
        weight, key = getattr(layer, "weight", None), f"{name}.weight"
        if isinstance(weight, Tensor) and is_quantized(weight) and key not in values:
            values[key] = dense_weight(layer).to(dtype)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        plain = type(quantized)(type(quantized.config).from_dict(settings))
    stored = {**dict(quantized.named_parameters()), **dict(quantized.named_buffers())}
    for key in plain.state_dict():
        values.setdefault(key, stored.get(key))
    present = {key: value.detach() for key, value in values.items() if value is not None}
    plain.load_state_dict(present, strict=False, assign=True)
    plain.tie_weights()
    empty = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"the quantized model has no values for {empty[0]}")
    plain.generation_config = quantized.generation_config
    return plain.to(dtype).eval()
