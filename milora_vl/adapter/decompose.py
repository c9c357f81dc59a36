"""Decompose the layers of a model: in parallel, shared between processes, with a cache on disk."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import closing
from dataclasses import asdict
from functools import partial

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from milora_vl.adapter.certificate import LayerCertificate
from milora_vl.adapter.factor_cache import FactorCache
from milora_vl.adapter.layer import (
    Decomposition,
    Prepared,
    Recipe,
    decompose_layer,
    naming,
    prepare_layer,
)
from milora_vl.memory import give_back_memory
from milora_vl.one_ahead import one_ahead, threads_of_one_core

SMALL_LAYER = 2048 * 2048  # elements; up to here one thread a layer beats all threads on one
LAYER_COPIES = 12  # float32 copies of a weight that decomposing it may hold at once
MEMORY_SHARE = 0.5  # of what is available, for layers that are decomposed at the same time


def decompose_layers(
    layers: Mapping[str, nn.Module],
    recipe: Recipe,
    cache: FactorCache | None = None,
    *,
    progress: bool = True,
    read: Callable[[str], Tensor] | None = None,
) -> Iterator[Decomposition]:
    """Yield the decomposition of every layer, as each gets done.

    In a distributed run each process decomposes a share of the layers of about equal cost, and all
    processes yield the same factors in the same order.

    Args:
        layers: Full name -> linear layer; not modified.
        recipe: How.
        cache: Where factors are looked up and kept; None for nowhere.
        progress: Show a progress bar with rate and remaining time.
        read: Full name -> float weight [d_out, d_in], in place of what the layers hold.

    Raises:
        ValueError: Naming the layer, if one cannot be decomposed; in every process.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    own_rank = dist.get_rank() if ranks > 1 else 0
    shares = share_out({name: _cost(layer) for name, layer in layers.items()}, ranks)
    names = shares[own_rank]

    def prepare(name: str) -> Prepared:
        with naming(name):
            return prepare_layer(name, layers[name], recipe, cache, read)

    def decompose(prepared: Prepared) -> Decomposition:
        with naming(prepared.name):
            return decompose_layer(prepared, recipe, cache)

    title = f"SVD ({recipe.slice}, r={recipe.r})"
    bar = tqdm(total=len(names), desc=title, disable=not progress or own_rank > 0)
    workers = count_workers([layers[name] for name in names])
    with bar, closing(_run(prepare, decompose, names, workers)) as results:
        if ranks == 1:
            for result in results:
                bar.update()
                yield result
            return
        own, failure = {}, ""
        try:
            for result in results:
                bar.update()
                own[result.name] = result
        except Exception as error:  # the others must hear of it, or they would wait for ever
            failure = str(error) or type(error).__name__
    yield from _exchange(layers, recipe.r, shares, own, failure)


def _cost(layer: nn.Module) -> int:
    return layer.in_features * layer.out_features * min(layer.in_features, layer.out_features)


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
    """Return how many layers to decompose at once: one a thread for small ones on the CPU, else 1.

    The routines for one small matrix hardly use a second thread.
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
        for future in as_completed([pool.submit(_both, prepare, decompose, n) for n in names]):
            yield future.result()


def _both(
    prepare: Callable[[str], Prepared], decompose: Callable[[Prepared], Decomposition], name: str
) -> Decomposition:
    return decompose(prepare(name))


def _exchange(
    layers: Mapping[str, nn.Module],
    r: int,
    shares: Sequence[Sequence[str]],
    own: Mapping[str, Decomposition],
    failure: str,
) -> Iterator[Decomposition]:
    """Yield all layers in every process, each sent by the process that decomposed it."""
    device = next(iter(layers.values())).weight.device
    for rank in range(len(shares)):
        if problem := _broadcast_text(failure, rank, device):
            raise ValueError(problem)
    owner = {name: rank for rank, share in enumerate(shares) for name in share}
    for name, layer in layers.items():
        mine = own.get(name)
        weight = layer.weight
        empty = partial(torch.empty, dtype=torch.float32, device=weight.device)
        lora_A, lora_B = empty(r, layer.in_features), empty(layer.out_features, r)
        text = ""
        if mine is not None:
            lora_A.copy_(mine.factors[0])
            lora_B.copy_(mine.factors[1])
            text = json.dumps([mine.digests, asdict(mine.certificate)])
        dist.broadcast(lora_A, owner[name])
        dist.broadcast(lora_B, owner[name])
        digests, numbers = json.loads(_broadcast_text(text, owner[name], device))
        certificate = LayerCertificate(**{**numbers, "shape": tuple(numbers["shape"])})
        yield Decomposition(name, (lora_A, lora_B), digests, certificate)


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
