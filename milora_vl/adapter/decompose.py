"""Decompose the layers of a model: in parallel, shared between processes, with a cache on disk.

Each layer takes two steps. ``prepare_layer`` reads the weight, hashes it and looks it up in the
cache; ``decompose_layer`` decomposes it on a miss, and measures the result. Large layers go one at
a time while the next weight is read; small ones run on one thread each.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from milora_vl.adapter.certificate import LayerCertificate, certify_layer
from milora_vl.adapter.experts import Stack, decompose_experts
from milora_vl.adapter.factor_cache import FactorCache, FactorEntry, FactorKey
from milora_vl.adapter.fingerprint import digest_of, is_wide, weight_digests
from milora_vl.adapter.fused import Rows
from milora_vl.adapter.minor_svd import minor_svd
from milora_vl.adapter.quantized import dense_weight, is_quantized, stored_values
from milora_vl.runtime import give_back_memory, one_ahead, threads_of_one_core


@dataclass(frozen=True)
class Recipe:
    """How a layer is decomposed and certified.

    Attributes:
        r: Rank, of each block of rows if there are several.
        slice: Part of the spectrum.
        svd: Method, see ``minor_svd``.
        scaling: lora_alpha / r.
        subtracted: Whether W_p will replace the weights.
        rows: Of a fused layer whose projections are decomposed one by one.
        scale: "singular": the start is U diag(S) Vh; "none": U Vh, orthonormal factors.
        stack: Of a tensor of experts, which are decomposed one by one and not cached.
    """

    r: int
    slice: str
    svd: str
    scaling: float
    subtracted: bool
    rows: Rows | None = None
    scale: str = "singular"
    stack: Stack | None = None

    @property
    def rank(self) -> int:
        """Rank of the layer's factors."""
        blocks = self.rows or self.stack
        return self.r * (blocks.count if blocks else 1)

    def split(self, weight: Tensor) -> list[Tensor]:
        """Return the matrices that are decomposed one by one."""
        return self.rows.split(weight) if self.rows else [weight]


@dataclass
class Prepared:
    """A weight in memory, and what is known of it.

    Attributes:
        name: Full module name.
        weight: [d_out, d_in] float; None once it is decomposed.
        stored_dtype: In which the layer holds it; None if quantized.
        from_codes: Whether it was dequantized from what the layer holds.
        keys: Of the factor cache, one a block.
        digests: See ``fingerprint.py``.
        entries: What the cache holds, one a block.
    """

    name: str
    weight: Tensor | None
    stored_dtype: torch.dtype | None
    from_codes: bool
    keys: list[FactorKey]
    digests: dict[str, str]
    entries: list[FactorEntry | None]


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
    quantized = read is None and is_quantized(layer.weight)
    weight = dense_weight(layer) if quantized else None  # [d_out, d_in] float32
    values = read(name) if read is not None else stored_values(layer)
    exact = digest_of(weight if quantized else values)
    cache = None if recipe.stack else cache
    keys = _keys(exact, weight if quantized else values, recipe)
    entries = [cache.get(key, recipe.r) if cache is not None else None for key in keys]
    digests = entries[0].digests if entries[0] is not None and not quantized else None
    # of wide values an entry may lack the rounded forms
    if not digests or (len(digests) == 1 and is_wide(values)):
        digests = weight_digests(values, exact=None if quantized else exact)
    return Prepared(
        name=name,
        weight=values if weight is None else weight,
        stored_dtype=None if is_quantized(layer.weight) else layer.weight.dtype,
        from_codes=quantized,
        keys=keys,
        digests=digests,
        entries=entries,
    )


def _keys(digest: str, weight: Tensor, recipe: Recipe) -> list[FactorKey]:
    """Return the cache key of each block: a block is found by the whole weight and its rows."""
    if recipe.stack:
        return [FactorKey(digest, (weight.shape[1], weight.shape[2]), recipe.slice, recipe.svd)]
    keys = []
    for index, block in enumerate(recipe.split(weight)):
        part = f"{digest} block {index} of {recipe.rows}" if recipe.rows else digest
        keys.append(FactorKey(part, (block.shape[0], block.shape[1]), recipe.slice, recipe.svd))
    return keys


def decompose_layer(prepared: Prepared, recipe: Recipe, cache: FactorCache | None) -> Decomposition:
    """Decompose one layer, or take what an earlier call computed for its values.

    Raises:
        ValueError: If the weight is not finite or too small for the rank.
    """
    if recipe.stack:
        both, certificate = decompose_experts(
            prepared.name,
            prepared.weight,
            recipe.stack,
            partial(minor_svd, r=recipe.r, method=recipe.svd, slice=recipe.slice),
            scaling=recipe.scaling,
            stored_dtype=prepared.stored_dtype,
            subtracted=recipe.subtracted,
            orthonormal=recipe.scale == "none",
        )
        return Decomposition(prepared.name, both, prepared.digests, certificate)
    weight, prepared.weight = prepared.weight.to(torch.float32), None  # held once from here on
    digests, parts = prepared.digests, []
    blocks = zip(recipe.split(weight), prepared.keys, prepared.entries, strict=True)
    for block, key, entry in blocks:
        if entry is not None:
            parts.append(tuple(x.to(weight.device) for x in entry.triplets))
            continue
        parts.append(minor_svd(block, recipe.r, method=recipe.svd, slice=recipe.slice))
        if cache is not None:  # digests of packed codes belong to the layer, not to these values
            cache.put(key, parts[-1], None if prepared.from_codes else digests)
    U, S, Vh = _stack(parts, recipe.rows)
    # without S the anchor subtracts U Vh instead of the slice itself: step 0 is W either way
    strengths = torch.ones_like(S) if recipe.scale == "none" else S
    lora_A, lora_B = lora_factors(U, strengths, Vh, scaling=recipe.scaling)
    ones = [torch.ones_like(part[0]) for part in parts]
    certificate = certify_layer(
        prepared.name,
        weight,
        (U, S, Vh),
        (recipe.scaling * lora_B, lora_A),
        stored_dtype=prepared.stored_dtype,
        subtracted=recipe.subtracted,
        support=recipe.rows.place(ones) if recipe.rows else None,
    )
    if recipe.scale == "none":  # a singular value of 0 leaves no factor at 0
        certificate = replace(certificate, zero_directions=0)
    return Decomposition(prepared.name, (lora_A, lora_B), digests, certificate)


def _stack(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], rows: Rows | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [d_out, n r], S [n r] and Vh [n r, d_in] of n blocks, each in its own rows."""
    if rows is None:
        return parts[0]
    U, S, Vh = zip(*parts, strict=True)
    return rows.place(U), torch.cat(S), torch.cat(Vh)


def lora_factors(U: Tensor, S: Tensor, Vh: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Return lora_A [r, d_in], lora_B [d_out, r]: scaling * lora_B @ lora_A = U diag(S) Vh."""
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the layer's name in front of errors raised in the block."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(f"{layer}: {reason}") from error


SMALL_LAYER = 2048 * 2048  # weights; up to here one thread a layer beats all threads on one
LAYER_COPIES = 12  # float32 copies of a weight that decomposing it may hold at once
MEMORY_SHARE = 0.5  # of what is available, for layers that are decomposed at the same time


def decompose_layers(
    layers: Mapping[str, nn.Module],
    recipe: Recipe,
    cache: FactorCache | None = None,
    *,
    progress: bool = True,
    read: Callable[[str], Tensor] | None = None,
    own: Mapping[str, Recipe] | None = None,
) -> Iterator[Decomposition]:
    """Yield the decomposition of every layer, each as soon as it is done.

    In a distributed run each process decomposes a share of the layers of about equal cost, and all
    processes yield the same factors in the same order.

    Args:
        layers: Full name -> linear layer; not modified.
        recipe: How each is decomposed.
        cache: Where factors are looked up and kept; None: decompose all.
        progress: Show a progress bar with rate and remaining time.
        read: Full name -> float weight [d_out, d_in], in place of what the layers hold.
        own: Full name -> recipe, of layers with their own rank or blocks of rows.

    Raises:
        ValueError: Naming the layer, if one cannot be decomposed; in every process.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    own_rank = dist.get_rank() if ranks > 1 else 0
    costs = {
        name: layer.in_features * layer.out_features * min(layer.in_features, layer.out_features)
        for name, layer in layers.items()
    }
    shares = share_out(costs, ranks)
    names = shares[own_rank]
    recipes = {name: (own or {}).get(name, recipe) for name in layers}

    def prepare(name: str) -> Prepared:
        with naming(name):
            return prepare_layer(name, layers[name], recipes[name], cache, read)

    def decompose(prepared: Prepared) -> Decomposition:
        with naming(prepared.name):
            return decompose_layer(prepared, recipes[prepared.name], cache)

    title = f"SVD ({recipe.slice}, r={recipe.r})"
    bar = tqdm(total=len(names), desc=title, disable=not progress or own_rank > 0)
    workers = count_workers([layers[name] for name in names])
    with bar, closing(_run(prepare, decompose, names, workers)) as results:
        if ranks == 1:
            for result in results:
                bar.update()
                yield result
            return
        results_here, failure = {}, ""
        try:
            for result in results:
                bar.update()
                results_here[result.name] = result
        except (
            Exception
        ) as error:  # the other processes must hear of it, or they would wait forever
            failure = str(error) or type(error).__name__
    yield from _exchange(layers, recipes, shares, results_here, failure)


def share_out(costs: Mapping[str, int], n_shares: int) -> list[list[str]]:
    """Share names out so that the sums of their costs are about equal; the same everywhere."""
    shares: list[list[str]] = [[] for _ in range(n_shares)]
    sums = [0] * n_shares
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = sums.index(min(sums))
        shares[least].append(name)
        sums[least] += costs[name]
    order = {name: index for index, name in enumerate(costs)}
    return [sorted(share, key=order.__getitem__) for share in shares]


def count_workers(layers: Sequence[nn.Module]) -> int:
    """Return how many layers to decompose at once: more than 1 for small layers on the CPU only.

    The routines for one small matrix gain little from a second thread.
    """
    sizes = [layer.in_features * layer.out_features for layer in layers]
    on_cpu = all(layer.weight.device.type == "cpu" for layer in layers)
    if not sizes or max(sizes) > SMALL_LAYER or not on_cpu:
        return 1
    memory = MEMORY_SHARE * psutil.virtual_memory().available
    return max(1, min(torch.get_num_threads(), int(memory / (LAYER_COPIES * 4 * max(sizes)))))


def _run(
    prepare: Callable[[str], Prepared],
    decompose: Callable[[Prepared], Decomposition],
    names: Sequence[str],
    workers: int,
) -> Iterator[Decomposition]:
    """Decompose several layers at once, or one while the next is read and digested beside it."""
    if workers == 1:
        for prepared in one_ahead(prepare, names):
            yield decompose(prepared)
            give_back_memory()
        return
    with threads_of_one_core(workers) as pool:
        jobs = [pool.submit(lambda name: decompose(prepare(name)), name) for name in names]
        for job in as_completed(jobs):
            yield job.result()


def _exchange(
    layers: Mapping[str, nn.Module],
    recipes: Mapping[str, Recipe],
    shares: Sequence[Sequence[str]],
    own: Mapping[str, Decomposition],
    failure: str,
) -> Iterator[Decomposition]:
    """Yield all layers in every process, each sent by the process that decomposed it."""
    # NCCL sends tensors of a GPU only, also where a layer is held on the CPU
    nccl = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    for rank in range(len(shares)):
        if problem := _broadcast_text(failure, rank, device):
            raise ValueError(problem)
    owner = {name: rank for rank, share in enumerate(shares) for name in share}
    for name, layer in layers.items():
        mine = own.get(name)
        empty = partial(torch.empty, dtype=torch.float32, device=device)
        r = recipes[name].rank
        lora_A, lora_B = empty(r, layer.in_features), empty(layer.out_features, r)
        text = ""
        if mine is not None:
            lora_A.copy_(mine.factors[0])
            lora_B.copy_(mine.factors[1])
            text = json.dumps([mine.digests, asdict(mine.certificate)])
        dist.broadcast(lora_A, owner[name])
        dist.broadcast(lora_B, owner[name])
        digests, numbers = json.loads(_broadcast_text(text, owner[name], device))
        certificate = LayerCertificate.from_dict(numbers)
        both = lora_A.to(layer.weight.device), lora_B.to(layer.weight.device)
        yield Decomposition(name, both, digests, certificate)


def _broadcast_text(text: str, source: int, device: torch.device) -> str:
    """Return the text of process ``source``; no pickle."""
    data = torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8, device=device)
    length = torch.tensor([data.numel()], device=device)
    dist.broadcast(length, source)
    if dist.get_rank() != source:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        dist.broadcast(data, source)
    return bytes(data.tolist()).decode("utf-8")
