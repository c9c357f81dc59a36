"""Turn a model with a MiLoRA adapter into a plain one."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from milora_vl.adapter.master import remove_master_weights_
from milora_vl.adapter.minor_svd import full_precision
from milora_vl.adapter.quantize import is_quantised
from milora_vl.adapter.state import (
    ANCHOR,
    MILORA,
    factors,
    lora_layer,
    recall,
    trained_projector,
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
        ValueError: If the model has no MiLoRA adapter or its base is quantised.
    """
    state = recall(peft_model)
    weights = {name: lora_layer(peft_model, name).get_base_layer().weight for name in state.modules}
    for name, weight in weights.items():
        if is_quantised(weight):
            raise ValueError(
                f"{name} is quantised ({type(weight).__name__}); a merge would round the adapter "
                "away. Load the base in bfloat16 or float32 and put the saved adapter on it with "
                "load_adapter(..., strict_base=False), then merge"
            )
    adapters = [MILORA, ANCHOR] if state.residual == "anchor" else [MILORA]
    for name, weight in weights.items():
        scaling = lora_layer(peft_model, name).scaling[MILORA]
        merged = weight.detach().to(torch.float32, copy=True)  # [d_out, d_in]
        for adapter in adapters:
            lora_A, lora_B = factors(peft_model, name, adapter)
            with full_precision():
                merged.addmm_(lora_B.detach(), lora_A.detach(), alpha=scaling)
        weight.data.copy_(merged)
    if state.projector:
        remove_master_weights_(trained_projector(peft_model, state.projector))
    return peft_model.unload()
