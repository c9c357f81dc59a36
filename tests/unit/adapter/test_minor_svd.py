# ruff: noqa: N806 - U, S, Vh as in the paper
"""Laws of the partial SVD."""

import pytest
import torch
from torch.testing import assert_close

from milora_vl.adapter.minor_svd import minor_svd, slice_indices

SHAPES = [(48, 48), (96, 40), (40, 96), (1, 7), (7, 1)]


def spectrum_matrix(d_out, d_in, values=None, seed=0):
    """Return a float64 matrix with a known, well separated spectrum."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, rank, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d_in, rank, generator=generator, dtype=torch.float64)).Q
    if values is None:
        values = torch.linspace(1.0, 0.1, rank, dtype=torch.float64)
    return (U * values) @ V.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slice_name", ["minor", "principal", "middle", "random"])
def test_spans_the_subspace_of_the_float64_svd(shape, slice_name):
    weight = spectrum_matrix(*shape)
    r = max(1, min(shape) // 4)
    U, S, Vh = minor_svd(weight.float(), r, slice=slice_name)
    U64, S64, Vh64 = torch.linalg.svd(weight, full_matrices=False)
    index = slice_indices(min(shape), r, slice_name)
    assert_close(S.double(), S64[index], atol=1e-5, rtol=0)
    right = Vh64[index].T @ Vh64[index]
    left = U64[:, index] @ U64[:, index].T
    assert_close(Vh.T.double() @ Vh.double(), right, atol=1e-4, rtol=0)
    assert_close(U.double() @ U.T.double(), left, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_orthonormal_descending_and_multiply_to_the_slice(shape):
    weight = spectrum_matrix(*shape).float()
    rank = min(shape)
    U, S, Vh = minor_svd(weight, rank)
    assert U.shape == (shape[0], rank)
    assert Vh.shape == (rank, shape[1])
    assert_close(U.T @ U, torch.eye(rank), atol=1e-5, rtol=0)
    assert_close(Vh @ Vh.T, torch.eye(rank), atol=1e-5, rtol=0)
    assert (S[:-1] >= S[1:]).all()
    assert_close((U * S) @ Vh, weight, atol=1e-5, rtol=0)  # r = min(shape): the whole matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_input_is_decomposed_as_the_values_it_holds(dtype):
    weight = spectrum_matrix(24, 16).to(dtype)
    before = weight.clone()
    U, S, Vh = minor_svd(weight, 4)
    assert {U.dtype, S.dtype, Vh.dtype} == {torch.float32}
    for got, wanted in zip((U, S, Vh), minor_svd(weight.float(), 4), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(weight, before)


def test_same_weight_gives_the_same_bits_and_fixed_signs():
    weight = spectrum_matrix(30, 20).float()
    first, second = minor_svd(weight, 5), minor_svd(weight.clone(), 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    Vh = first[2]
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    # the signs do not come from the input: -W has the same Vh and the opposite U
    U_negated, _, Vh_negated = minor_svd(-weight, 5)
    assert_close(Vh_negated, Vh, atol=1e-5, rtol=0)
    assert_close(U_negated, -first[0], atol=1e-5, rtol=0)


def test_rank_deficient_minor_slice_lies_in_the_null_space():
    values = torch.cat([torch.linspace(1, 0.5, 12), torch.zeros(8)]).double()
    weight = spectrum_matrix(32, 20, values).float()
    U, S, Vh = minor_svd(weight, 8)
    assert S.max() < 1e-6
    assert (weight @ Vh.T).norm() < 1e-5
    assert (U.T @ weight).norm() < 1e-5


def test_zero_matrix_gives_finite_orthonormal_factors():
    U, S, Vh = minor_svd(torch.zeros(10, 6), 3)
    assert torch.equal(S, torch.zeros(3))
    assert_close(U.T @ U, torch.eye(3))
    assert_close(Vh @ Vh.T, torch.eye(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_refused_with_the_count(bad):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 16 values"):
        minor_svd(weight, 2)


@pytest.mark.parametrize("r", [0, -1, 5])
def test_rank_out_of_range_is_refused(r):
    with pytest.raises(ValueError, match=f"r={r} is out of range"):
        minor_svd(torch.ones(4, 6), r)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="expected a matrix"):
        minor_svd(torch.ones(4), 1)
    with pytest.raises(ValueError, match="dequantize"):
        minor_svd(torch.ones(4, 4, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="slice='max' is unknown"):
        minor_svd(torch.ones(4, 4), 1, slice="max")
    with pytest.raises(ValueError, match="method='fast' is unknown"):
        minor_svd(torch.ones(4, 4), 1, method="fast")


@pytest.mark.parametrize("method", ["exact", "krylov"])
@pytest.mark.parametrize("slice_name", ["minor", "random"])
def test_switches_of_the_process_change_nothing(method, slice_name):
    weight = torch.randn(160, 128, generator=torch.Generator().manual_seed(0))
    how = {"method": method, "slice": slice_name}
    plain = minor_svd(weight, 4, **how)
    with torch.autocast("cpu", torch.bfloat16):
        within = minor_svd(weight, 4, **how)
        assert (weight @ weight.T).dtype == torch.bfloat16  # it is on again
    with torch.device("meta"):
        elsewhere = minor_svd(weight, 4, **how)
    torch.set_default_dtype(torch.bfloat16)
    try:
        lower = minor_svd(weight, 4, **how)
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (within, elsewhere, lower):
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_values_whose_scales_are_elsewhere_are_refused():
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*load the checkpoint in bfloat16"):
        minor_svd(torch.randn(8, 6).to(torch.float8_e4m3fn), 2)
