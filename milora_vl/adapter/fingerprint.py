"""A digest of the weights an adapter was made on, to recognize them when it is loaded."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from milora_vl.adapter.experts import layer_of
from milora_vl.adapter.quantized import stored_values
from milora_vl.model.shards import ShardedWeights
from milora_vl.runtime import gather_json, process_count, process_rank

PRECISIONS: dict[str, torch.dtype] = {
    "exact": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NARROWEST_FIRST = (torch.bfloat16, torch.float16, torch.float32)
PIECE_VALUES = 1 << 22  # digested at a time by one thread; part of what a digest means
MAX_THREADS = 8  # more wait for memory
SCHEME = "v2:"  # before a fingerprint of bytes in the narrowest dtype; older ones have no prefix


def weight_digests(weight: Tensor, exact: str | None = None) -> dict[str, str]:
    """Digest the values of one weight: once if they are held in 16 bits, or as codes.

    Wider ones are also digested as 16-bit loading rounds them, which tells such a base again where
    no checkpoint is at hand. What 16 bits hold is left to the checkpoint on disk.

    Args:
        weight: [d_out, d_in] float, or the codes of a quantized weight.
        exact: Its digest, where it is known already.

    Returns:
        Precision ("exact"; for wide weights "bfloat16" and "float16", too) -> digest.
    """
    exact = exact or digest_of(weight)
    if not is_wide(weight):
        return {"exact": exact}
    return rounded_digests(weight, exact)


def is_wide(weight: Tensor) -> bool:
    """Tell whether a weight is held in more than 16 bits."""
    return weight.is_floating_point() and weight.element_size() > 2


def rounded_digests(weight: Tensor, exact: str) -> dict[str, str]:
    """Return the digests of the values as they are and as both 16-bit dtypes round them."""
    digests = dict.fromkeys(PRECISIONS, exact)
    if weight.is_floating_point():
        for precision in ("bfloat16", "float16"):
            dtype = PRECISIONS[precision]
            if not all(_holds(dtype, piece) for piece in _split(weight)):
                digests[precision] = digest_of(weight, rounded_to=dtype)
    return digests


def digest_of(values: Tensor, rounded_to: torch.dtype | None = None) -> str:
    """Return a digest of float values or of quantized codes, computed by several threads.

    Float values are digested as the bytes of the narrowest dtype that holds all of them, so the
    dtype in which the same values are held does not matter, and 16-bit weights are read as they
    are, without a copy.

    Args:
        values: Any shape, any device.
        rounded_to: Dtype to which float values are rounded first.

    Returns:
        Name of the dtype and SHA-256, of the digests of the pieces if there are several.
    """
    pieces = _split(values)
    kept_in = values.dtype
    if values.is_floating_point():
        rounded_to = rounded_to or values.dtype
        kept_in = next(
            (d for d in NARROWEST_FIRST if all(_holds(d, x.to(rounded_to)) for x in pieces)),
            torch.float32,
        )

    def digest(piece: Tensor) -> bytes:
        if piece.is_floating_point():
            piece = piece.to(rounded_to).to(kept_in)
        data = piece.cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.sha256(memoryview(data)).digest()

    digests = _in_threads(digest, pieces)
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()
    return f"{str(kept_in).removeprefix('torch.')}:{whole.hex()}"


def _split(values: Tensor) -> Sequence[Tensor]:
    return values.detach().reshape(-1).split(PIECE_VALUES)


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return values.dtype == dtype or torch.equal(values.to(dtype).to(values.dtype), values)


def _in_threads(digest: Callable[[Tensor], bytes], pieces: Sequence[Tensor]) -> list[bytes]:
    """Digest the pieces at the same time: hashlib lets other threads run meanwhile."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # they share the cores of the node
    threads = min(MAX_THREADS, len(pieces), (os.cpu_count() or 1) // processes)
    if threads < 2:
        return [digest(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(digest, pieces))


def is_older(recorded: dict[str, str]) -> bool:
    """Tell whether a fingerprint is of float32 bytes, as up to format 3 of ``milora.json``."""
    return not recorded["exact"].startswith(SCHEME)


def _older_digest(values: Tensor, rounded_to: torch.dtype) -> str:
    sha256 = hashlib.sha256()
    for piece in _split(values):
        if piece.is_floating_point():
            piece = piece.to(rounded_to).to(torch.float32)
        sha256.update(memoryview(piece.cpu().contiguous().numpy()).cast("B"))
    return sha256.hexdigest()


def combine_digests(digests: dict[str, dict[str, str]], scheme: str = SCHEME) -> dict[str, str]:
    """Combine per-layer digests (full name -> precision -> digest) into one per precision.

    A precision that is known of only some layers is skipped.
    """
    known = [key for key in PRECISIONS if all(key in one for one in digests.values())]
    lines = {
        precision: "\n".join(f"{name} {digests[name][precision]}" for name in sorted(digests))
        for precision in known
    }
    return {key: scheme + hashlib.sha256(text.encode()).hexdigest() for key, text in lines.items()}


def fingerprint(
    model: nn.Module,
    modules: Sequence[str],
    weights: ShardedWeights | None = None,
    *,
    only_exact: bool = False,
    older: bool = False,
    together: bool = False,
) -> dict[str, str]:
    """Return the fingerprint of the named linear layers of a base model, per precision.

    Args:
        model: The base model; of layers that PEFT wrapped the weights below are read.
        modules: Full names of linear layers of ``model``.
        weights: Float weights on disk, digested instead of those in memory.
        only_exact: Leave the rounded forms out, which cost several times as much.
        older: As adapters of format 2 and 3 record it.
        together: Every process of the job makes this call, on the same base: each digests a share
            of the layers, and all get the digests of all.

    Returns:
        "exact": of the values as loaded; "bfloat16" and "float16": of the same values rounded.

    Raises:
        ValueError: If a named layer is missing.
    """
    precisions = {"exact": torch.float32} if only_exact else PRECISIONS
    layers = {name: _base_layer(model, name) for name in modules}
    share = modules[process_rank() :: process_count()] if together else modules
    digests = {}
    for name in share:
        values = weights.weight_of(name, dtype=None) if weights else stored_values(layers[name])
        if older:
            digests[name] = {key: _older_digest(values, to) for key, to in precisions.items()}
        else:
            exact = digest_of(values)
            digests[name] = {"exact": exact} if only_exact else rounded_digests(values, exact)
    if together:
        digests = {name: found for part in gather_json(digests) for name, found in part.items()}
    return combine_digests(digests, scheme="" if older else SCHEME)


def _base_layer(model: nn.Module, name: str) -> Any:
    try:
        return layer_of(model, name)
    except AttributeError as error:
        raise ValueError(f"the model has no layer {name}: another architecture") from error
