"""Properties of the minor SVD over shapes, ranks and spectra, against the float64 projectors."""

# ruff: noqa: N806 - U, S, Vh as in the paper

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from milora_vl.adapter.minor_svd import NotConvergedError, krylov_minor_svd, minor_svd

EPSILON = torch.finfo(torch.float32).eps
EDGE = (
    0.01  # singular values closer than this to the edge of the slice, relative, may go either way
)
LOST = 3e-3  # mean squared sine allowed


def geometric(n, generator):
    """Condition numbers of 10 to a million."""
    exponent = float(torch.rand((), generator=generator)) * 5 + 1
    return torch.logspace(0, -exponent, n, dtype=torch.float64)


def clustered(n, generator):
    """A few values, each many times; the members of a cluster differ by rounding only."""
    levels = torch.rand(4, generator=generator).double().sort(descending=True).values + 0.05
    return levels[torch.randint(0, 4, (n,), generator=generator).sort().values]


def hard_edge(n, generator):
    """The singular values of a square Gaussian matrix: the smallest goes to 0 as 1/n."""
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.linalg.svdvals(noise)


def soft_edge(n, generator):
    """The singular values of a tall Gaussian matrix, far from 0 and close to each other."""
    noise = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    return torch.linalg.svdvals(noise)


def zeros(n, generator):
    """Rank deficient: up to half of the values are exactly 0."""
    kept = n - int(torch.randint(1, n // 2, (), generator=generator))
    return torch.cat([torch.linspace(2, 0.5, kept), torch.zeros(n - kept)]).double()


def outliers(n, generator):
    """Noise and some directions a thousand times as strong, as in trained weights."""
    values = hard_edge(n, generator)
    values[: n // 10] *= 1000
    return values


CONVERGING = [geometric, clustered, hard_edge, soft_edge]
SPECTRA = [*CONVERGING, zeros, outliers]  # of the last two, float32 often cannot factorise G


@st.composite
def cases(draw):
    """Draw a float32 weight [d_out, d_in] of a known kind and a rank."""
    side = draw(st.integers(24, 140))
    other = side + draw(st.sampled_from([0, 1, 17, 2 * side]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spectrum = draw(st.sampled_from(SPECTRA))
    values = spectrum(side, generator)
    left = torch.randn(other, side, generator=generator, dtype=torch.float64)
    right = torch.randn(side, side, generator=generator, dtype=torch.float64)
    weight = (torch.linalg.qr(left).Q * values) @ torch.linalg.qr(right).Q.T
    scale = 10.0 ** draw(st.integers(-6, 4))
    weight = (weight * scale).float()
    r = draw(st.integers(1, side // 6))
    slice_values = torch.linalg.svdvals(weight)[-r:].tolist()
    note(f"{spectrum.__name__}, {other} x {side}, r={r}, scale {scale}, slice {slice_values}")
    return (weight if draw(st.booleans()) else weight.T.contiguous()), r


def mean_sine2(inner, outer):
    """Return how far the rows of ``inner`` [k, n] are from the span of the rows of ``outer``."""
    if not len(inner):
        return 0.0
    return 1 - float((inner @ outer.T).square().sum()) / len(inner)


def check_slice(weight, r, found):
    """Compare with the float64 decomposition of the same float32 values.

    Where the edge of the slice cuts a cluster, no set of r vectors is *the* slice: what was found
    must hold all that is clearly below the edge, and nothing that is clearly above.
    """
    U, S, Vh = (x.double() for x in found)
    U64, S64, Vh64 = torch.linalg.svd(weight.double(), full_matrices=False)
    rounding = 100 * EPSILON * float(S64[0])
    edge = float(S64[-r])
    below, upto = S64.lt(edge * (1 - EDGE) - rounding), S64.le(edge * (1 + EDGE) + rounding)
    singular = float(S64[-1]) <= rounding
    for vectors, basis in ((Vh, Vh64), (U.T, U64.T)):
        eye = torch.eye(r, dtype=torch.float64)
        assert float((vectors @ vectors.T - eye).abs().max()) <= 1e-4
        # the null space on the long side is larger than what the decomposition lists of it
        vague = singular and basis.shape[1] > min(weight.shape)
        assert mean_sine2(vectors, complement(basis[~upto]) if vague else basis[upto]) <= LOST
        assert vague or mean_sine2(basis[below], vectors) <= LOST
    assert (S[:-1] >= S[1:]).all()
    assert (S >= 0).all()
    assert float((S - S64[-r:]).abs().max()) <= 5e-3 * edge + rounding
    residual = float((weight.double() @ Vh.T - U * S).norm())
    assert residual <= 0.05 * float(S64[-r:].norm()) + rounding * r**0.5


def complement(rows):
    """Return orthonormal rows that span what ``rows`` [k, n] do not."""
    full = torch.linalg.svd(rows, full_matrices=True).Vh
    return full[len(rows) :]


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["auto", "exact", "krylov"]))
def test_any_method_gives_the_slice(case, method):
    weight, r = case
    check_slice(weight, r, minor_svd(weight, r, method=method))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_krylov_method_is_right_or_says_that_it_is_not(case):
    weight, r = case
    try:
        found = krylov_minor_svd(weight, r)
    except (NotConvergedError, torch.linalg.LinAlgError):
        return
    check_slice(weight, r, found)


@pytest.mark.parametrize("spectrum", CONVERGING, ids=lambda spectrum: spectrum.__name__)
def test_the_krylov_method_is_not_given_up_without_need(spectrum):
    generator = torch.Generator().manual_seed(0)
    values = spectrum(128, generator)
    left = torch.randn(160, 128, generator=generator, dtype=torch.float64)
    right = torch.randn(128, 128, generator=generator, dtype=torch.float64)
    weight = ((torch.linalg.qr(left).Q * values) @ torch.linalg.qr(right).Q.T).float()
    check_slice(weight, 6, krylov_minor_svd(weight, 6))
