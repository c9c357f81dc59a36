"""Turn a model with a MiLoRA adapter into a plain one."""

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.adapter.master import remove_master_weights_
from milora_vl.adapter.minor_svd import full_precision
from milora_vl.adapter.quantize import dense_weight, is_quantised
from milora_vl.adapter.state import (
    anchor_of,
    corrections,
    current_adapter,
    factors,
    lora_layer,
    magnitude,
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
                "away. Save the adapter, then `milora-vl export --form merged` merges it onto the "
                "original or the dequantised weights"
            )
    adapter_name = current_adapter(peft_model)
    for name, weight in weights.items():
        merged = merged_weight(peft_model, name, weight.detach().to(torch.float32, copy=True))
        weight.data.copy_(merged)
    if state.projector:
        remove_master_weights_(trained_projector(peft_model, state.projector, adapter_name))
    return peft_model.unload()


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
            weight.addmm_(lora_B, lora_A, alpha=lora_layer(peft_model, name).scaling[adapter])
    if state.init == "dora":
        length = magnitude(peft_model, name, adapter_name).detach().to(torch.float32)  # [d_out]
        weight.mul_((length / weight.norm(dim=1))[:, None])
    return weight


def dequantised_model(peft_model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a plain model with the weights of a quantised one and its adapter merged into them.

    Every quantised weight is read as the values it stands for; adapted ones get the adapter added
    before they are rounded to ``dtype``. The PEFT model is used up.

    Args:
        peft_model: From ``attach_milora`` or ``load_adapter`` on a quantised base.
        dtype: Of the returned weights; default: that of the parts that were not quantised.
    """
    state, adapter_name = recall(peft_model), current_adapter(peft_model)
    dtype = dtype or peft_model.get_base_model().get_input_embeddings().weight.dtype
    values = {
        f"{name}.weight": merged_weight(
            peft_model, name, dense_weight(lora_layer(peft_model, name).get_base_layer())
        ).to(dtype)
        for name in state.modules
    }
    if state.projector:
        remove_master_weights_(trained_projector(peft_model, state.projector, adapter_name))
    quantised = peft_model.unload()
    for name, layer in quantised.named_modules():
        weight, key = getattr(layer, "weight", None), f"{name}.weight"
        if isinstance(weight, Tensor) and is_quantised(weight) and key not in values:
            values[key] = dense_weight(layer).to(dtype)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        plain = type(quantised)(type(quantised.config).from_dict(settings))
    stored = {**dict(quantised.named_parameters()), **dict(quantised.named_buffers())}
    for key in plain.state_dict():
        values.setdefault(key, stored.get(key))
    present = {key: value.detach() for key, value in values.items() if value is not None}
    plain.load_state_dict(present, strict=False, assign=True)
    plain.tie_weights()
    empty = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"the quantised model has no values for {empty[0]}")
    plain.generation_config = quantised.generation_config
    return plain.to(dtype).eval()
