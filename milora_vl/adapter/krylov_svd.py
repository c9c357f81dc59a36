"""The smallest singular triplets of a matrix without its full decomposition.

The Gram matrix G of the short side is factorised as ``G - shift I = L L^T``; a block Krylov space
of its inverse holds the wanted directions after a few solves. The triplets are then taken from the
original matrix restricted to that space, not from G, whose small eigenvalues drown in rounding.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

START_SOLVES = 2
MIN_BLOCKS = 3
MAX_BLOCKS = 7
MAX_LIFTS = 6
MAX_SPACE_RATIO = 2 / 3  # of the short side; beyond, the exact method is as fast
NOISE_RATIO = 1e3  # eigenvalues of G below this many roundings of the largest are not trusted
CLUSTERED_RATIO = 0.01  # smallest over largest eigenvalue of the start: one more block at once
RESIDUAL_TOLERANCE = 0.015  # relative to the wanted singular values
RESIDUAL_ROUNDINGS = 50  # of the largest singular value, below which residuals are only rounding
ORTHOGONALITY_TOLERANCE = 1e-4
PANELS = 4
PANEL_MIN_COLUMNS = 2048
EPSILON = torch.finfo(torch.float32).eps


class NotConvergedError(ArithmeticError):
    """The Krylov method cannot reach its accuracy on this matrix; the exact method can."""


@dataclass(frozen=True)
class ShiftedGram:
    """A Gram matrix and a factor of its shifted copy.

    Attributes:
        gram: G = T^T T, [N, N].
        factor: Lower Cholesky factor of G - shift I, [N, N].
        shift: Below the smallest eigenvalue of G; negative where rounding made that necessary.
        largest: Estimate of the largest eigenvalue of G.
    """

    gram: Tensor
    factor: Tensor
    shift: float
    largest: float

    def solve(self, block: Tensor) -> Tensor:
        """Return (G - shift I)^-1 block, [N, b]."""
        return torch.cholesky_solve(block, self.factor)


def krylov_minor_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the r smallest singular triplets by shifted inverse block Krylov iteration.

    Args:
        weight: [d_out, d_in], float32, finite.
        r: Number of triplets, well below min(d_out, d_in).

    Returns:
        U [d_out, r], S [r] descending, Vh [r, d_in].

    Raises:
        NotConvergedError: If the space would not be small, the matrix cannot be factorised in
            float32, or the result misses the tolerance for residuals or orthogonality.

    Cost: one Gram product and one or two factors of the short side N, a few solves, and a QR
        decomposition with at most 2 N / 3 columns.
    """
    if weight.shape[0] < weight.shape[1]:
        V, S, Uh = krylov_minor_svd(weight.T, r)
        return Uh.T, S, V.T
    columns = weight.shape[1]
    width = r + max(16, r // 8)  # some more than wanted, for the edge of the slice
    if MIN_BLOCKS * width > columns * MAX_SPACE_RATIO:
        raise NotConvergedError(f"r={r} is too large for a Krylov space in {columns} dimensions")
    scale = weight.norm() / columns**0.5  # root mean square of the singular values
    if not scale > 0:
        raise NotConvergedError("the matrix is zero")
    tall = weight / scale  # [M, N], M >= N
    inverse = factorise(compute_gram(tall))
    block, values = _start(tall, inverse, width)
    if float(values[-1]) < NOISE_RATIO * EPSILON * inverse.largest:
        inverse = factorise_finely(tall, inverse)
        block, values = _start(tall, inverse, width)
    else:
        inverse = shift_towards(inverse, block, values, r)
    U, S, V = _iterate(tall, inverse, block, values, r)
    for factor in (U, V):
        error = float((factor.T @ factor - torch.eye(r, device=factor.device)).abs().max())
        if not error <= ORTHOGONALITY_TOLERANCE:
            raise NotConvergedError(f"the factors are not orthonormal: error {error:.1e}")
    return U, S * scale, V.T


def compute_gram(tall: Tensor) -> Tensor:
    """Return tall^T tall [N, N]; a large one from panels of its upper triangle only."""
    columns = tall.shape[1]
    if columns < PANEL_MIN_COLUMNS:
        return tall.T @ tall
    gram = tall.new_empty(columns, columns)
    edges = [columns * i // PANELS for i in range(PANELS + 1)]
    for start, end in itertools.pairwise(edges):
        panel = tall[:, start:end].T @ tall[:, start:]  # [end - start, N - start]
        gram[start:end, start:] = panel
        gram[start:, start:end] = panel.T
    return gram


def factorise(gram: Tensor) -> ShiftedGram:
    """Factorise G, lifted by as little as its rounding needs.

    Raises:
        NotConvergedError: If no small lift makes it positive definite.
    """
    block = _random_block(gram, 4)
    for _ in range(5):
        block = torch.linalg.qr(gram @ block).Q
    largest = float((block * (gram @ block)).sum(dim=0).max())
    lift = 4 * EPSILON * largest
    for _ in range(MAX_LIFTS):
        if (factor := _cholesky(gram, -lift)) is not None:
            return ShiftedGram(gram, factor, -lift, largest)
        lift *= 4
    raise NotConvergedError("the Gram matrix is not positive definite in float32")


def factorise_finely(tall: Tensor, inverse: ShiftedGram) -> ShiftedGram:
    """Factorise G as R^T R from a QR decomposition of T, which squares no rounding error.

    Raises:
        NotConvergedError: If T is singular in float32.
    """
    R = torch.linalg.qr(tall, mode="r").R  # [N, N]
    if not float(R.diagonal().abs().min()) > 0:
        raise NotConvergedError("the matrix is singular")
    return ShiftedGram(inverse.gram, R.T.contiguous(), 0.0, inverse.largest)


def shift_towards(inverse: ShiftedGram, block: Tensor, values: Tensor, r: int) -> ShiftedGram:
    """Move the shift to just under the smallest eigenvalue, if that speeds up convergence.

    Where the smallest singular values are far from zero and close to each other (tall matrices),
    the unshifted inverse hardly tells them apart.

    Args:
        inverse: The unshifted factor.
        block: [N, p], approximate eigenvectors of the smallest eigenvalues.
        values: [p] ascending, their approximate eigenvalues.
        r: Number of wanted triplets.
    """
    smallest, edge = float(values[0]), float(values[-1])
    if smallest < 0.05 * edge:
        return inverse
    first = block[:, :1]
    error = float((inverse.gram @ first - smallest * first).norm())
    gap = max(error, 0.05 * (float(values[r - 1]) - smallest), 16 * EPSILON * inverse.largest)
    while smallest - gap > 0:
        if (factor := _cholesky(inverse.gram, smallest - gap)) is not None:
            return ShiftedGram(inverse.gram, factor, smallest - gap, inverse.largest)
        gap *= 2
    return inverse


def _cholesky(gram: Tensor, shift: float) -> Tensor | None:
    moved = gram.clone()
    moved.diagonal().sub_(shift)
    factor, info = torch.linalg.cholesky_ex(moved)
    return factor if int(info) == 0 else None


def _random_block(like: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the same on every device and in every run
    return torch.randn(like.shape[0], width, generator=generator).to(like.device)


def _start(tall: Tensor, inverse: ShiftedGram, width: int) -> tuple[Tensor, Tensor]:
    """Return approximate eigenvectors [N, width] and eigenvalues [width], ascending, of G."""
    block = torch.linalg.qr(_random_block(inverse.gram, width)).Q
    for _ in range(START_SOLVES):
        block = torch.linalg.qr(inverse.solve(block)).Q
    _, singular, right = torch.linalg.svd(tall @ block, full_matrices=False)
    return block @ right.T.flip(1), singular.flip(0).square()


def _iterate(
    tall: Tensor, inverse: ShiftedGram, block: Tensor, values: Tensor, r: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Extend the Krylov space until the r smallest triplets within it are converged."""
    clustered = float(values[0]) > CLUSTERED_RATIO * float(values[-1])
    floor = RESIDUAL_ROUNDINGS * EPSILON * (inverse.largest * r) ** 0.5
    basis, blocks = block, 1
    while True:
        block = _next_block(inverse, basis, block)
        basis, blocks = torch.cat([basis, block], dim=1), blocks + 1
        if blocks < MIN_BLOCKS + clustered:
            continue
        U, S, V = _restricted_svd(tall, basis, r)
        if inverse.shift <= 0:
            U = _refine_left(tall, inverse, U, S, V)
        residual = float((tall.T @ U - V * S).norm())
        if residual <= max(RESIDUAL_TOLERANCE * float(S.norm()), floor):
            return U, S, V
        full = (blocks + 1) * block.shape[1] > tall.shape[1] * MAX_SPACE_RATIO
        if full or blocks == MAX_BLOCKS:
            relative = residual / max(float(S.norm()), floor)
            raise NotConvergedError(f"relative residual {relative:.1e} after {blocks} blocks")


def _next_block(inverse: ShiftedGram, basis: Tensor, block: Tensor) -> Tensor:
    """Return the next Krylov block [N, p], orthonormal and orthogonal to ``basis``."""
    following = inverse.solve(block)
    for _ in range(2):
        following = following - basis @ (basis.T @ following)
        following = torch.linalg.qr(following).Q
    return following


def _restricted_svd(tall: Tensor, basis: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r smallest triplets U [M, r], S [r], V [N, r] of ``tall`` within ``basis``."""
    reflectors, tau = torch.geqrf(tall @ basis)  # [M, d]
    width = basis.shape[1]
    left, S, right = torch.linalg.svd(reflectors[:width].triu())
    U = torch.zeros(tall.shape[0], r, dtype=tall.dtype, device=tall.device)
    U[:width] = left[:, -r:]
    return torch.ormqr(reflectors, tau, U), S[-r:], basis @ right[-r:].T


def _refine_left(tall: Tensor, inverse: ShiftedGram, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Remove from U what rounding in V left of the large singular directions.

    ``u = T v / s`` enlarges an error of V along the largest direction by ``largest / s``.
    """
    residual = tall.T @ U - V * S  # [N, r]
    refined = U - tall @ inverse.solve(residual)
    Q, R = torch.linalg.qr(refined)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
