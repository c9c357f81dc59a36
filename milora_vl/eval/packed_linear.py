"""Linear layers of a float32 model on the CPU, packed for oneDNN while many rows go through them.

PyTorch multiplies float32 matrices on the CPU with MKL, which uses the widest vectors on some makes
of CPU only; oneDNN uses them on all. The sums are the same up to the order of rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MIN_ROWS = 64  # fewer are bound by reading the weight, where packing costs
MIN_SIDE = 16
MEMORY_SHARE = 0.25  # of what is available, for the packed copies


class PackedLinear(nn.Module):
    """A linear layer with a packed copy of its weight.

    Args:
        layer: Float32, on the CPU; it still does what has few rows.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """Pack the weight."""
        super().__init__()
        self.layer = layer
        self.packed = layer.weight.detach().to_mkldnn()
        self.packed_bias = None if layer.bias is None else layer.bias.detach().to_mkldnn()

    @property
    def weight(self) -> Tensor:
        """The weight as it was, [d_out, d_in]."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., d_in] -> [..., d_out]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < MIN_ROWS or x.dtype != torch.float32:
            return self.layer(x)
        product = linear(rows.contiguous().to_mkldnn(), self.packed, self.packed_bias).to_dense()
        return product.view(*x.shape[:-1], -1)


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Pack the float32 linear layers of a model on the CPU for a ``with`` block, if memory allows.

    No gradient flows through packed layers.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _can_be_packed(child)
    ]
    needed = sum(child.weight.numel() * child.weight.element_size() for _, _, child in places)
    if needed > MEMORY_SHARE * psutil.virtual_memory().available:
        places = []
    try:
        for parent, name, child in places:
            setattr(parent, name, PackedLinear(child))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and min(weight.shape) >= MIN_SIDE and torch.backends.mkldnn.is_available()
