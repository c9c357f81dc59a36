"""Quantized weights: recognize them, read their values, evaluate without repacking them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

QUANTIZED_CLASSES: tuple[str, ...] = ("Params4bit", "Int8Params")


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is stored quantized, by its class.

    The dtype does not decide: packed 4-bit values may be stored under a float dtype.
    """
    return any(
        kind.__name__ in QUANTIZED_CLASSES or kind.__module__.startswith("torchao.")
        for kind in type(weight).__mro__
    )


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as a new float32 tensor [d_out, d_in] on its device.

    Quantized weights are dequantized.
    """
    weight = layer.weight
    if is_quantized(weight):
        from peft.utils.integrations import dequantize_module_weight

        unpack_(layer)
        weight = dequantize_module_weight(layer)
    return weight.detach().to(torch.float32, copy=True)


def stored_values(layer: nn.Module) -> Tensor:
    """Return what identifies the weight of a layer: its values as held, or its codes.

    The codes stay the same when bitsandbytes repacks a layer on the CPU; its scales, and with them
    the dequantized values, are rounded then.
    """
    if not is_quantized(layer.weight):
        return layer.weight.detach()
    unpack_(layer)
    return layer.weight.data.view(torch.uint8)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights of a model; weights packed in 4 bits count one by one."""
    states = [(p.shape, getattr(p, "quant_state", None)) for p in model.parameters()]
    return sum(math.prod(getattr(state, "shape", shape)) for shape, state in states)


def unpack_(layer: nn.Module) -> None:
    """Undo the repacking of a 4-bit weight that an eval-mode forward on the CPU does."""
    quant_state = getattr(layer.weight, "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        layer.state_dict()  # bitsandbytes unpacks the layer when it collects its state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in eval mode for a ``with`` block, except its 4-bit layers.

    In eval mode on the CPU, bitsandbytes repacks 4-bit weights for a kernel without a backward
    pass, and later training would get no gradient through them. These layers have no dropout.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if isinstance(getattr(module, "weight", None), Tensor) and is_quantized(module.weight):
            module.training = True
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training
