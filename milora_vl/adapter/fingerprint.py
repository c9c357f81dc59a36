"""A digest of the weights an adapter was made on: on others it is not loaded unnoticed."""

import hashlib
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from milora_vl.adapter.quantized import stored_values
from milora_vl.model.shards import ShardedWeights

PRECISIONS: dict[str, torch.dtype] = {
    "exact": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PIECE_VALUES = 1 << 20  # rounded at a time, so that no second copy of a weight is held


def weight_digests(weight: Tensor, exact: str | None = None) -> dict[str, str]:
    """Digest the values of one weight as they are and as low-precision loading rounds them.

    Values are digested as float32 bytes, so the dtype in which the same values are held does not
    matter, and a base that was decomposed in float32 is recognised when loaded in bfloat16.

    Args:
        weight: [d_out, d_in] float, or the codes of a quantized weight.
        exact: Its digest, where it is known already.

    Returns:
        Precision ("exact", "bfloat16", "float16") -> SHA-256 of the values.
    """
    exact = exact or digest_of(weight)
    digests = dict.fromkeys(PRECISIONS, exact)
    if weight.is_floating_point():
        pieces = weight.detach().reshape(-1).split(PIECE_VALUES)
        for precision, dtype in PRECISIONS.items():
            if not all(torch.equal(x.to(dtype).to(x.dtype), x) for x in pieces):
                digests[precision] = _digest(pieces, dtype)
    return digests


def digest_of(values: Tensor) -> str:
    """Return the SHA-256 of float values, as float32 bytes, or of quantized codes."""
    return _digest(values.detach().reshape(-1).split(PIECE_VALUES), torch.float32)


def _digest(pieces: Iterable[Tensor], rounded_to: torch.dtype) -> str:
    sha256 = hashlib.sha256()
    for piece in pieces:
        if piece.is_floating_point():
            piece = piece.to(rounded_to).to(torch.float32)
        sha256.update(memoryview(piece.cpu().contiguous().numpy()).cast("B"))
    return sha256.hexdigest()


def combine_digests(digests: dict[str, dict[str, str]]) -> dict[str, str]:
    """Combine per-layer digests (full name -> precision -> digest) into one per precision."""
    lines = {
        precision: "\n".join(f"{name} {digests[name][precision]}" for name in sorted(digests))
        for precision in PRECISIONS
    }
    return {key: hashlib.sha256(text.encode()).hexdigest() for key, text in lines.items()}


def fingerprint(
    model: nn.Module, modules: Iterable[str], weights: ShardedWeights | None = None
) -> dict[str, str]:
    """Return the fingerprint of the named linear layers of a base model, per precision.

    Args:
        model: The base model; of layers that PEFT wrapped the weights below are read.
        modules: Full names of linear layers of ``model``.
        weights: Float weights on disk, digested instead of those in memory.

    Returns:
        "exact": of the values as loaded; "bfloat16" and "float16": of the same values rounded.

    Raises:
        ValueError: If a named layer is missing.
    """
    digests = {}
    for name in modules:
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the model has no layer {name}: another architecture") from error
        if isinstance(layer, BaseTunerLayer):
            layer = layer.get_base_layer()
        digests[name] = weight_digests(weights.weight_of(name) if weights else stored_values(layer))
    return combine_digests(digests)
