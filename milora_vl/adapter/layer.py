"""One layer: its weight read and recognised, decomposed into start factors, and certified."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from milora_vl.adapter.certificate import LayerCertificate, certify_layer
from milora_vl.adapter.factor_cache import FactorCache, FactorEntry, FactorKey
from milora_vl.adapter.fingerprint import digest_of, weight_digests
from milora_vl.adapter.minor_svd import minor_svd
from milora_vl.adapter.quantize import dense_weight, is_quantised, stored_values


@dataclass(frozen=True)
class Recipe:
    """How every layer is decomposed and certified.

    Attributes:
        r: Rank.
        slice: Part of the spectrum.
        svd: Method, see ``minor_svd``.
        scaling: lora_alpha / r.
        subtracted: Whether W_p will replace the weights.
    """

    r: int
    slice: str
    svd: str
    scaling: float
    subtracted: bool


@dataclass
class Prepared:
    """A weight in memory, and what is known of it.

    Attributes:
        name: Full module name.
        weight: [d_out, d_in] float; None once it was decomposed.
        stored_dtype: In which the layer holds it; None if quantised.
        from_codes: Whether it was dequantised from what the layer holds.
        key: Of the factor cache.
        digests: See ``fingerprint.py``.
        entry: What the cache holds.
    """

    name: str
    weight: Tensor | None
    stored_dtype: torch.dtype | None
    from_codes: bool
    key: FactorKey
    digests: dict[str, str]
    entry: FactorEntry | None


@dataclass(frozen=True)
class Decomposition:
    """What came of one layer.

    Attributes:
        name: Full module name.
        factors: lora_A [r, d_in] and lora_B [d_out, r], float32; scaling * lora_B @ lora_A is the
            slice.
        digests: Of the weight, see ``fingerprint.py``.
        certificate: Numbers of the layer.
    """

    name: str
    factors: tuple[Tensor, Tensor]
    digests: dict[str, str]
    certificate: LayerCertificate


def prepare_layer(
    name: str,
    layer: nn.Module,
    recipe: Recipe,
    cache: FactorCache | None,
    read: Callable[[str], Tensor] | None = None,
) -> Prepared:
    """Read one weight, digest it and look it up in the cache."""
    quantised = read is None and is_quantised(layer.weight)
    weight = dense_weight(layer) if quantised else None  # [d_out, d_in] float32
    values = read(name) if read is not None else stored_values(layer)
    exact = digest_of(weight if quantised else values)
    shape = tuple((weight if quantised else values).shape)
    key = FactorKey(exact, (shape[0], shape[1]), recipe.slice, recipe.svd)
    entry = cache.get(key, recipe.r) if cache is not None else None
    if not quantised and entry is not None and "digests" in entry.facts:
        digests = entry.facts["digests"]
    else:
        digests = weight_digests(values, exact=None if quantised else exact)
    return Prepared(
        name=name,
        weight=values if weight is None else weight,
        stored_dtype=None if is_quantised(layer.weight) else layer.weight.dtype,
        from_codes=quantised,
        key=key,
        digests=digests,
        entry=entry,
    )


def decompose_layer(prepared: Prepared, recipe: Recipe, cache: FactorCache | None) -> Decomposition:
    """Decompose one layer, or take what an earlier call computed for its values.

    Raises:
        ValueError: If the weight is not finite or too small for the rank.
    """
    weight, prepared.weight = prepared.weight.to(torch.float32), None  # held once from here on
    entry, digests = prepared.entry, prepared.digests
    # what the stored numbers depend on beside the weight, and which they are
    settings = [recipe.r, recipe.scaling, str(prepared.stored_dtype), recipe.subtracted]
    numbers = json.dumps([*settings, *(field.name for field in fields(LayerCertificate))])
    certificates = dict(entry.facts.get("certificates", {})) if entry is not None else {}
    if entry is not None:
        U, S, Vh = (x.to(weight.device) for x in entry.triplets)
    else:
        U, S, Vh = minor_svd(weight, recipe.r, method=recipe.svd, slice=recipe.slice)
    lora_A, lora_B = lora_factors(U, S, Vh, scaling=recipe.scaling)
    known = certificates.get(numbers)
    if known is not None:
        certificate = LayerCertificate(
            **{**known, "name": prepared.name, "shape": prepared.key.shape}
        )
    else:
        certificate = certify_layer(
            prepared.name,
            weight,
            (U, S, Vh),
            (recipe.scaling * lora_B, lora_A),
            stored_dtype=prepared.stored_dtype,
            subtracted=recipe.subtracted,
        )
    if cache is not None and (entry is None or entry.stored_rank == recipe.r) and known is None:
        facts = {"certificates": {**certificates, numbers: asdict(certificate)}}
        kept = facts | ({} if prepared.from_codes else {"digests": digests})
        cache.put(prepared.key, (U, S, Vh), kept)
    return Decomposition(prepared.name, (lora_A, lora_B), digests, certificate)


def lora_factors(U: Tensor, S: Tensor, Vh: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Return lora_A [r, d_in], lora_B [d_out, r]: scaling * lora_B @ lora_A = U diag(S) Vh."""
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Name the layer in whatever goes wrong."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(f"{layer}: {reason}") from error
