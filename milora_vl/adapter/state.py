"""A model with a MiLoRA adapter: its two PEFT adapters, what it has to remember, what is active."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_vl.adapter.master import keep_master_weights_
from milora_vl.adapter.minor_svd import full_precision

MILORA = "milora"
ANCHOR = "anchor"
CORRECTION = "correction"

Residual = Literal["subtract", "anchor"]


@dataclass(frozen=True)
class MiloraState:
    """Facts of an attached adapter that its tensors do not tell.

    Attributes:
        r: Adapter rank.
        lora_alpha: LoRA alpha; the scaling is lora_alpha / r.
        slice: Part of the spectrum the adapter started from.
        svd: SVD method asked for.
        residual: "subtract": the base weights were replaced by W_p; "anchor": they are untouched.
        lora_dropout: Dropout of the trainable adapter.
        modules: Full names of the adapted layers.
        projector: Full name of the projector that trains in full, or None.
        fingerprint: Of the original weights of ``modules``, see ``fingerprint.py``.
        quantization_correction: "low_rank" if a 4-bit residual has a frozen correction.
    """

    r: int
    lora_alpha: float
    slice: str
    svd: str
    residual: Residual
    lora_dropout: float
    modules: tuple[str, ...]
    projector: str | None
    fingerprint: dict[str, str]
    quantization_correction: str = "none"

    @property
    def scaling(self) -> float:
        """lora_alpha / r, dimensionless."""
        return self.lora_alpha / self.r


def remember(peft_model: PeftModel, state: MiloraState) -> None:
    """Keep ``state`` with the model, so that it survives copies and wrapping."""
    peft_model.milora_state = state


def recall(peft_model: nn.Module) -> MiloraState:
    """Return the state kept with a model that ``attach_milora`` or ``load_adapter`` made.

    Raises:
        ValueError: If the model has none.
    """
    state = getattr(peft_model, "milora_state", None)
    if not isinstance(state, MiloraState):
        raise ValueError(
            f"this {type(peft_model).__name__} was not made by attach_milora or load_adapter; "
            "if a trainer wrapped it, pass the unwrapped PeftModel"
        )
    return state


def add_adapters(model: PreTrainedModel, state: MiloraState) -> PeftModel:
    """Wrap a model with the two adapters of ``state``; their values are still arbitrary."""
    shared = {
        "r": state.r,
        "lora_alpha": state.lora_alpha,
        "target_modules": list(state.modules),
        "bias": "none",
        "init_lora_weights": False,
    }
    milora = LoraConfig(
        **shared,
        lora_dropout=state.lora_dropout,
        modules_to_save=[state.projector] if state.projector else None,
    )
    # float32 factors also on bfloat16 bases: PEFT then adds both products in float32 and rounds
    # once, so the anchor cancels the untrained adapter exactly
    peft_model = get_peft_model(model, milora, adapter_name=MILORA, autocast_adapter_dtype=True)
    peft_model.add_adapter(ANCHOR, LoraConfig(**shared), autocast_adapter_dtype=True)
    if state.projector:
        keep_master_weights_(trained_projector(peft_model, state.projector))
    return peft_model


def trained_projector(peft_model: PeftModel, name: str) -> nn.Module:
    """Return the copy of the projector that trains; the original stays beside it."""
    return peft_model.get_base_model().get_submodule(name).modules_to_save[MILORA]


def subtract_anchor_(peft_model: PeftModel, modules: Sequence[str]) -> None:
    """Write W_p = W - s B0 A0 into the base weights, in their own dtype."""
    for name in modules:
        layer = lora_layer(peft_model, name)
        lora_A, negative_lora_B = factors(peft_model, name, ANCHOR)
        weight = layer.get_base_layer().weight
        with full_precision():
            negative_minor = negative_lora_B.detach() @ lora_A.detach()  # [d_out, d_in]
        negative_minor.mul_(layer.scaling[ANCHOR])
        weight.data.copy_(weight.detach().to(torch.float32) + negative_minor)


def lora_layer(peft_model: PeftModel, name: str) -> LoraLayer:
    """Return the PEFT layer that wraps the base layer of full name ``name``."""
    return peft_model.get_base_model().get_submodule(name)


def factors(peft_model: PeftModel, name: str, adapter: str) -> tuple[Tensor, Tensor]:
    """Return lora_A [r, d_in] and lora_B [d_out, r] of one adapter on one layer (not copies)."""
    layer = lora_layer(peft_model, name)
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def activate(peft_model: PeftModel, residual: Residual, *, trainable: bool) -> None:
    """Make the adapters take part as ``residual`` needs, and freeze what must not train.

    The anchor never trains. PEFT sets it trainable again whenever it activates adapters, for
    example on leaving ``peft_model.disable_adapter()``; call this afterwards.
    """
    active = [MILORA, ANCHOR] if residual == "anchor" else [MILORA]
    frozen = [name for name in (ANCHOR, CORRECTION) if name in peft_model.peft_config]
    active += [name for name in frozen if name == CORRECTION]
    peft_model.base_model.set_adapter(active, inference_mode=not trainable)
    peft_model.set_requires_grad(frozen, requires_grad=False)


@contextmanager
def pretrained_function(peft_model: PeftModel) -> Iterator[PeftModel]:
    """Let the model compute what the pretrained base computes, for the length of a ``with`` block.

    ``peft_model.disable_adapter()`` alone would leave W_p without its minor part in subtract mode.

    Raises:
        ValueError: If the model carries no MiLoRA adapter.
    """
    state = recall(peft_model)
    flags = {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    layers = [lora_layer(peft_model, name) for name in state.modules]
    try:
        if state.residual == "subtract":
            # the anchor holds (A0, -B0); with its scale negated the layer is W_p + s B0 A0 = W
            corrections = [name for name in (CORRECTION,) if name in peft_model.peft_config]
            peft_model.base_model.set_adapter([ANCHOR, *corrections], inference_mode=True)
            for layer in layers:
                layer.set_scale(ANCHOR, -1.0)
            yield peft_model
        else:
            with peft_model.disable_adapter():
                yield peft_model
    finally:
        if state.residual == "subtract":
            for layer in layers:
                layer.set_scale(ANCHOR, 1.0)
        activate(peft_model, state.residual, trainable=True)
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(flags[name])
