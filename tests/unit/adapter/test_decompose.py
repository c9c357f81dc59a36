"""Laws of decomposing a whole model: in any order, on any number of processes, the same factors."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from milora_vl.adapter.decompose import (
    SMALL_LAYER,
    Recipe,
    count_workers,
    decompose_layers,
    share_out,
)
from milora_vl.adapter.factor_cache import FactorCache
from milora_vl.runtime import one_ahead

RECIPE = Recipe(r=4, slice="minor", svd="auto", scaling=2.0, subtracted=True)


def build_layers(bad=None):
    torch.manual_seed(0)
    sizes = [(16, 24), (40, 24), (24, 24), (24, 16), (16, 40), (30, 30)]
    layers = {f"layer{i}": nn.Linear(*size, bias=False) for i, size in enumerate(sizes)}
    if bad is not None:
        layers[bad].weight.data[0, 0] = float("nan")
    return layers


def decompose_all(layers, cache=None, read=None):
    results = decompose_layers(layers, RECIPE, cache, progress=False, read=read)
    return {done.name: done for done in results}


def reader(layers, missing):
    def read(name):
        if name == missing:
            raise KeyError(f"{name} is not in the file")
        return layers[name].weight.detach()

    return read


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, done in one.items():
        assert all(torch.equal(a, b) for a, b in zip(done.factors, two[name].factors, strict=True))
        assert done.digests == two[name].digests
        assert done.certificate == two[name].certificate


def test_threads_give_what_one_thread_gives(monkeypatch):
    many = decompose_all(build_layers())
    threads = torch.get_num_threads()
    monkeypatch.setattr("milora_vl.adapter.decompose.count_workers", lambda layers: 3)
    assert_same(decompose_all(build_layers()), many)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [1, 3])
def test_the_layer_that_cannot_be_decomposed_is_named(monkeypatch, workers):
    monkeypatch.setattr("milora_vl.adapter.decompose.count_workers", lambda layers: workers)
    with pytest.raises(ValueError, match="layer3: 1 of 384 values are NaN or infinite"):
        decompose_all(build_layers("layer3"))


def test_shares_are_whole_and_about_equal():
    costs = {f"layer{i}": (i % 7 + 1) ** 3 for i in range(50)}
    for n in (1, 2, 3, 8):
        shares = share_out(costs, n)
        assert sorted(name for share in shares for name in share) == sorted(costs)
        sums = [sum(costs[name] for name in share) for share in shares]
        assert max(sums) - min(sums) <= max(costs.values())
    assert share_out({"a": 1}, 2) == [["a"], []]


def test_one_ahead_keeps_the_order_and_is_never_two_ahead():
    begun, used = [], []
    for value in one_ahead(lambda name: begun.append(name) or name.upper(), list("abcde")):
        assert len(begun) <= len(used) + 2  # the one in use and the next
        used.append(value)
    assert used == list("ABCDE")
    assert list(one_ahead(str.upper, [])) == []


def test_one_ahead_raises_where_the_failed_one_is_due_and_gives_the_threads_back():
    def work(name):
        if name == "c":
            raise ValueError(name)
        return name

    threads, used = torch.get_num_threads(), []
    results = one_ahead(work, list("abcd"))
    with pytest.raises(ValueError, match="c"):
        used.extend(results)
    assert used == ["a", "b"]
    assert torch.get_num_threads() == threads


def test_large_layers_get_all_threads():
    small, large = nn.Linear(8, 8), nn.Linear(SMALL_LAYER // 8 + 1, 8, device="meta")
    assert count_workers([small, small]) == torch.get_num_threads()
    assert count_workers([small, large]) == 1
    assert count_workers([]) == 1


JOBS = {
    "whole": {},
    "bad": {"bad": "layer3"},
    "missing": {"missing": "layer2"},
}


def work(rank, port, folder):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        for name, options in JOBS.items():
            do_job(rank, folder / name, **options)
    finally:
        dist.destroy_process_group()


def do_job(rank, folder, bad=None, missing=None):
    layers = build_layers(bad)
    read = reader(layers, missing) if missing else None
    folder.mkdir(exist_ok=True)
    try:
        result = decompose_all(layers, FactorCache(folder / f"cache{rank}"), read)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
        return
    torch.save(
        {name: [*done.factors, done.certificate.sigma_max] for name, done in result.items()},
        folder / f"{rank}.pt",
    )


@pytest.fixture(scope="module")
def done_by_two(tmp_path_factory):
    """Every job of JOBS done by the same two processes, whose start is what takes time."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder), nprocs=2)
    return folder


def test_two_processes_share_the_work_and_get_identical_factors(done_by_two):
    folder = done_by_two / "whole"
    alone = decompose_all(build_layers())
    for rank in (0, 1):
        result = torch.load(folder / f"{rank}.pt", weights_only=True)
        assert sorted(result) == sorted(alone)  # they come as they are done
        for name, (*pair, sigma_max) in result.items():
            for got, wanted in zip(pair, alone[name].factors, strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
            assert sigma_max == pytest.approx(alone[name].certificate.sigma_max, rel=1e-6)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in first:
        assert all(
            torch.equal(a, b) for a, b in zip(first[name][:2], second[name][:2], strict=True)
        )
    # each process keeps in its cache what it decomposed itself: half of the six layers
    assert [len(list((folder / f"cache{rank}").iterdir())) for rank in (0, 1)] == [3, 3]


def test_an_error_in_one_process_is_raised_in_both(done_by_two):
    for rank in (0, 1):
        assert (
            (done_by_two / "bad" / f"{rank}.txt")
            .read_text()
            .startswith("layer3: 1 of 384 values are NaN")
        )


def test_a_weight_that_one_process_cannot_read_is_named_in_both(done_by_two):
    for rank in (0, 1):
        assert (
            done_by_two / "missing" / f"{rank}.txt"
        ).read_text() == "layer2: layer2 is not in the file"
