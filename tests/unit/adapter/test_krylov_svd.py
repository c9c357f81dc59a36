"""Laws of the Krylov method: as good as the exact one where it answers, and it knows where not."""

# ruff: noqa: N806 - U, S, Vh as in the paper

import logging

import pytest
import torch
from torch.testing import assert_close

from milora_vl.adapter.minor_svd import (
    NotConvergedError,
    ShiftedGram,
    Tall,
    factorize,
    krylov_minor_svd,
    minor_svd,
)


def weight_with(values, d_out, d_in, seed=0):
    """Return a float32 matrix with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, rank, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(d_in, rank, generator=generator)).Q
    return (U * values) @ V.T


def llm_like(d_out, d_in, seed=0):
    """Return noise plus a few strong directions, as trained weights look."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    strong = torch.logspace(1.5, 0, min(d_out, d_in) // 8)
    left = torch.linalg.qr(torch.randn(d_out, len(strong), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(d_in, len(strong), generator=generator)).Q
    return noise + (left * strong) @ right.T


@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
@pytest.mark.parametrize("r", [4, 16])
def test_agrees_with_the_float64_svd(shape, r):
    weight = llm_like(*shape)
    U64, S64, Vh64 = torch.linalg.svd(weight.double(), full_matrices=False)
    U, S, Vh = krylov_minor_svd(weight, r)
    right = ((Vh.double() @ Vh64[-r:].T) ** 2).sum() / r  # mean cos^2 of the subspaces
    left = ((U.T.double() @ U64[:, -r:]) ** 2).sum() / r
    assert min(right, left) > 0.999
    assert float((S**2).sum() / (S64[-r:] ** 2).sum()) == pytest.approx(1.0, abs=1e-3)
    assert (S[:-1] >= S[1:]).all()
    assert_close(U.T @ U, torch.eye(r), atol=1e-4, rtol=0)
    assert_close(Vh @ Vh.T, torch.eye(r), atol=1e-4, rtol=0)
    assert (weight @ Vh.T - U * S).norm() < 1e-4 * weight.norm()


@pytest.mark.parametrize("power", [0, -1, -3])  # the last is beyond a Gram matrix in float32
def test_large_condition_number_spoils_neither_side(power):
    weight = weight_with(torch.logspace(2, power, 256), 256, 256)
    r = 8
    U, S, Vh = krylov_minor_svd(weight, r)
    # contamination by the largest direction would show here, enlarged by the condition number
    assert (weight.T @ U - Vh.T * S).norm() < 1e-5 * weight.norm()
    assert (weight @ Vh.T - U * S).norm() < 1e-5 * weight.norm()


def test_rank_deficient_matrix_gives_its_null_space():
    values = torch.cat([torch.linspace(2, 1, 236), torch.zeros(20)])
    weight = weight_with(values, 256, 256)
    U, S, Vh = minor_svd(weight, 10, method="krylov")
    assert S.max() < 1e-5
    assert (weight @ Vh.T).norm() < 1e-4
    assert (U.T @ weight).norm() < 1e-4


def test_result_is_deterministic():
    weight = llm_like(256, 200)
    first, second = (minor_svd(weight, 8, method="krylov") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_clustered_spectrum_still_takes_the_smallest_energy():
    weight = torch.randn(600, 200, generator=torch.Generator().manual_seed(0))
    _, S, _ = minor_svd(weight, 8, method="krylov")
    best = torch.linalg.svdvals(weight)[-8:]
    assert float((S**2).sum() / (best**2).sum()) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(
    ("weight", "r", "reason"),
    [
        (torch.zeros(256, 256), 4, "zero"),
        (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), 32, "too large"),
    ],
)
def test_hopeless_cases_fall_back_to_exact_with_the_reason(weight, r, reason, caplog):
    with pytest.raises(NotConvergedError, match=reason):
        krylov_minor_svd(weight, r)
    with caplog.at_level(logging.INFO, logger="milora_vl"):
        fallback = minor_svd(weight, r, method="krylov")
    assert reason in caplog.text
    exact = minor_svd(weight, r, method="exact")
    assert all(torch.equal(a, b) for a, b in zip(fallback, exact, strict=True))


def test_unconverged_space_is_noticed(monkeypatch):
    def lazy(inverse, block):
        generator = torch.Generator().manual_seed(int(block.abs().sum()))
        return torch.randn(block.shape, generator=generator)

    monkeypatch.setattr(ShiftedGram, "solve", lazy)
    with pytest.raises(NotConvergedError, match="relative residual"):
        krylov_minor_svd(llm_like(256, 256), 8)


def test_other_slices_are_done_exactly():
    weight = llm_like(256, 256)
    for slice_name in ("principal", "middle", "random"):
        krylov = minor_svd(weight, 8, method="krylov", slice=slice_name)
        exact = minor_svd(weight, 8, method="exact", slice=slice_name)
        assert all(torch.equal(a, b) for a, b in zip(krylov, exact, strict=True))


@pytest.mark.parametrize("shape", [(1200, 1000), (90, 37), (384, 384)])
def test_packed_products_are_the_plain_ones(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) / shape[0] ** 0.5
    right, left = (torch.randn(side, 70, generator=generator) for side in shape[::-1])
    tall = Tall(values)
    assert_close(tall.gram(), values.T @ values, atol=1e-5, rtol=0)
    assert torch.equal(tall.gram(), tall.gram().T)
    assert_close(tall.times(right), values @ right, atol=1e-4, rtol=0)
    assert_close(tall.transposed_times(left), values.T @ left, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [40, 384, 1000])
def test_blocked_factor_inverts_the_shifted_matrix(size):
    generator = torch.Generator().manual_seed(0)
    gram = Tall(torch.randn(2 * size, size, generator=generator) / size**0.5).gram()
    block = torch.randn(size, 80, generator=generator)
    smallest = float(torch.linalg.eigvalsh(gram)[0])
    for shift in (-0.1, smallest - 0.01):
        solution = factorize(gram, shift).solve(block)
        assert_close(gram @ solution - shift * solution, block, atol=1e-3, rtol=0)
    assert factorize(gram, smallest + 0.01) is None
