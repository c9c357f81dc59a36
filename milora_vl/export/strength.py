"""The forgetting dial: a model that computes W + strength * (what training added to W).

What an adapter adds is s (B A - B0 A0) = s [B, -B0] [A; A0], so scaling B and B0 by the strength is
exact: 0 gives the base, 1 the trained model. A projector that trained in full goes the same
straight way from its pretrained weights to its trained ones. Smaller updates forget less, and
usually keep most of what was learned.
"""

import torch
from peft import PeftModel
from torch import Tensor, nn

from milora_vl.adapter.state import (
    anchor_of,
    current_adapter,
    factors,
    recall,
    trained_projector,
    trained_state,
)


class Strength:
    """The dial of one model: it keeps a copy of what was trained, and can be turned at any time.

    Args:
        peft_model: From ``load_adapter`` or ``attach_milora``, its base weights untouched.

    Raises:
        ValueError: If the adapter is a DoRA, or changed the base weights (residual "subtract").
    """

    def __init__(self, peft_model: PeftModel) -> None:
        """See the class."""
        state, adapter_name = recall(peft_model), current_adapter(peft_model)
        if state.init == "dora":
            raise ValueError(
                "a strength needs an update that is added to the weights; DoRA also rescales their "
                "rows, and part of that is no low-rank update"
            )
        if state.has_anchor and state.residual == "subtract":
            raise ValueError(
                "a strength needs the base weights themselves, and this adapter has replaced them "
                "by W_p; load it with residual='anchor' (from a base in 4 bits: merge with "
                "--merge-onto original)"
            )
        parts = [adapter_name, *([anchor_of(adapter_name)] if state.has_anchor else [])]
        self._live = [factors(peft_model, name, p)[1] for p in parts for name in state.modules]
        self._trained = [lora_B.detach().clone() for lora_B in self._live]
        self._projector: list[tuple[Tensor, Tensor, Tensor]] = []  # live, trained, pretrained
        if state.projector:
            trained = trained_projector(peft_model, state.projector, adapter_name)
            self._projector = _pairs(trained, _original(peft_model, state.projector))

    @torch.no_grad()
    def set_(self, strength: float) -> None:
        """Let the model compute W + ``strength`` * (what training added); 1 is what was trained."""
        for live, trained in zip(self._live, self._trained, strict=True):
            live.copy_(trained if strength == 1 else strength * trained)
        for live, trained, pretrained in self._projector:
            # both ends exactly, whatever the rounding of a sum
            value = {0: pretrained, 1: trained}.get(strength)
            live.copy_(pretrained.lerp(trained, strength) if value is None else value)


def scale_update_(peft_model: PeftModel, strength: float) -> None:
    """Scale what training added to a model, once; raises as ``Strength`` does."""
    if strength != 1:
        Strength(peft_model).set_(strength)


def _original(peft_model: PeftModel, name: str) -> nn.Module:
    return peft_model.get_base_model().get_submodule(name).original_module


def _pairs(trained: nn.Module, original: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return live tensor, copy of it, and pretrained value in its dtype, of every float tensor."""
    base, pairs = original.state_dict(), []
    for key, live in trained_state(trained).items():
        if live.is_floating_point():
            pretrained = base[key].detach().to(live.device, live.dtype)
            pairs.append((live, live.detach().clone(), pretrained))
    return pairs
