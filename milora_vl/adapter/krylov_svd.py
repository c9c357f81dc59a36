"""The smallest singular triplets of a matrix without its full decomposition.

The Gram matrix G of the short side is factorised as ``G - shift I = L L^T``; a block Krylov space
of its inverse holds the wanted directions after a few solves. The triplets are then taken from the
original matrix restricted to the best directions of that space, not from G, whose small eigenvalues
drown in rounding; and where that rounding could have turned the directions themselves, residuals
of the original matrix correct them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from milora_vl.adapter.gram import (
    EPSILON,
    LARGEST_COLUMNS,
    ShiftedGram,
    Tall,
    factorise,
    from_lower,
    largest_eigenvalue,
)

FIRST_BLOCKS = 3  # of the space that locates the smallest eigenvalues
SHIFTED_BLOCKS = 2  # at least, of the space of the shifted inverse
MAX_BLOCKS = 9
MAX_LIFTS = 6
MAX_SHIFTS = 3
MAX_CORRECTIONS = 3
MAX_SPACE_RATIO = 2 / 3  # of the short side; beyond, the exact method is as fast
NOISE_RATIO = 1e4  # eigenvalues of G below this many roundings of the largest are not trusted
DROWNED_RATIO = 4  # below this many, they hold nothing of the matrix
CLUSTERED_RATIO = 0.05  # smallest over largest eigenvalue of the slice, from where shifting pays
SINE2_TOLERANCE = 1e-4  # mean squared sine between slice and space, before the last improvements
SINE2_BEFORE_CORRECTION = 1e-3
RESIDUAL_TOLERANCE = 0.015  # relative to the wanted singular values
RESIDUAL_ROUNDINGS = 50  # of the largest singular value, below which residuals are only rounding
ORTHOGONALITY_TOLERANCE = 1e-4
SMALLEST_SCALE = 1e-8


class NotConvergedError(ArithmeticError):
    """The Krylov method cannot reach its accuracy on this matrix; the exact method can."""


@dataclass(frozen=True)
class Space:
    """Approximate eigenvectors of the smallest eigenvalues of G.

    Attributes:
        vectors: [N, p], orthonormal, p > r; the smallest eigenvalue first.
        values: Their eigenvalues, [p] ascending.
        bound: Below the smallest eigenvalue, as far as its residual tells.
        sine2: Estimated mean squared sine between the r smallest eigenvectors and ``vectors``.
    """

    vectors: Tensor
    values: Tensor
    bound: float
    sine2: float


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

    Cost: half a Gram product (it is symmetric), one or two Cholesky factors of the short side N,
        six to nine solves with about r columns, and some six products of the weight with as many.
        Where the wanted values drown in the rounding of the Gram matrix, a QR decomposition too.
        Memory: three matrices of the size of the weight for a moment, then two and some of N x N.
    """
    if weight.shape[0] < weight.shape[1]:
        V, S, Uh = krylov_minor_svd(weight.T, r)
        return Uh.T, S, V.T
    scale = float(weight.norm()) / weight.shape[1] ** 0.5  # root mean square singular value
    if not scale > 0:
        raise NotConvergedError("the matrix is zero")
    if SMALLEST_SCALE < scale < 1 / SMALLEST_SCALE:
        return _tall_minor_svd(weight, r)
    U, S, Vh = _tall_minor_svd(weight / scale, r)  # the squares would leave float32
    return U, S * scale, Vh


def _tall_minor_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    columns = weight.shape[1]
    width = r + max(16, r // 4)  # some more than wanted, for the edge of the slice
    if FIRST_BLOCKS * width > columns * MAX_SPACE_RATIO:
        raise NotConvergedError(f"r={r} is too large for a Krylov space in {columns} dimensions")
    tall = Tall(weight)
    gram = tall.gram()
    largest = largest_eigenvalue(gram, _random_block(gram, LARGEST_COLUMNS))
    noise = NOISE_RATIO * EPSILON * largest
    inverse, space = _locate(weight, gram, r, width, largest, noise)
    del gram
    floor = RESIDUAL_ROUNDINGS * EPSILON * (largest * r) ** 0.5
    corrections = int(float(space.values[r - 1]) < noise)
    U, S, V = triplets_in(tall, inverse, space, r, floor, corrections)
    for factor in (U, V):
        identity = torch.eye(r, dtype=factor.dtype, device=factor.device)
        error = float((factor.T @ factor - identity).abs().max())
        if not error <= ORTHOGONALITY_TOLERANCE:
            raise NotConvergedError(f"the factors are not orthonormal: error {error:.1e}")
    return U, S, V.T


def _locate(
    weight: Tensor, gram: Tensor, r: int, width: int, largest: float, noise: float
) -> tuple[ShiftedGram, Space]:
    """Find the space of the r smallest eigenvalues, and the factor of G that suits it best."""
    inverse = factorise_lifted(gram, largest)
    start = torch.linalg.qr(_random_block(gram, width)).Q
    space = expand(inverse, start, r, noise, least=FIRST_BLOCKS, shiftable=True)
    if float(space.values[r - 1]) < DROWNED_RATIO * EPSILON * largest:
        # they drown in the rounding of G: a factor of G that never squares T
        del inverse
        inverse = factorise_finely(weight)
        space = expand(inverse, start, r, noise, least=FIRST_BLOCKS)
    elif space.sine2 > SINE2_TOLERANCE and is_clustered(space.values, r):
        del inverse  # as large as G
        inverse = shift_towards(gram, space, r, largest) or factorise_lifted(gram, largest)
        space = expand(inverse, space.vectors, r, noise, least=SHIFTED_BLOCKS)
    return inverse, space


def factorise_lifted(gram: Tensor, largest: float) -> ShiftedGram:
    """Factorise G, lifted by as little as its rounding needs.

    Raises:
        NotConvergedError: If no small lift makes it positive definite.
    """
    lift = EPSILON * largest
    for _ in range(MAX_LIFTS):
        if (inverse := factorise(gram, -lift)) is not None:
            return inverse
        lift *= 4
    raise NotConvergedError("the Gram matrix is not positive definite in float32")


def factorise_finely(tall: Tensor) -> ShiftedGram:
    """Factorise G = T^T T as R^T R from a QR decomposition of T.

    Raises:
        NotConvergedError: If T is singular in float32.
    """
    R = torch.linalg.qr(tall, mode="r").R  # [N, N]
    if not float(R.diagonal().abs().min()) > 0:
        raise NotConvergedError("the matrix is singular")
    return from_lower(R.T.contiguous(), 0.0)


def is_clustered(values: Tensor, r: int) -> bool:
    """Tell whether the r smallest eigenvalues lie far from zero and close to each other.

    As in tall matrices. The unshifted inverse hardly tells them apart then.
    """
    return float(values[0]) > CLUSTERED_RATIO * float(values[r - 1])


def shift_towards(gram: Tensor, space: Space, r: int, largest: float) -> ShiftedGram | None:
    """Factorise G with the shift just under its smallest eigenvalue, where that pays."""
    smallest, edge = float(space.values[0]), float(space.values[r - 1])
    gap = max(smallest - space.bound, 0.05 * (edge - smallest), 16 * EPSILON * largest)
    for _ in range(MAX_SHIFTS):
        if smallest - gap <= 0:
            return None
        if (inverse := factorise(gram, smallest - gap)) is not None:
            return inverse
        gap *= 2
    return None


def _random_block(like: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the same on every device and in every run
    shape = like.shape[0], width
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def expand(
    inverse: ShiftedGram,
    block: Tensor,
    r: int,
    noise: float,
    *,
    least: int,
    shiftable: bool = False,
) -> Space:
    """Build a block Krylov space of the inverse until it holds the r smallest eigenvectors.

    Args:
        inverse: Applied once a block.
        block: [N, p] orthonormal, p > r: where to start.
        r: Number of wanted eigenvectors.
        noise: Eigenvalues of G below it are not trusted; corrections follow, so less will do.
        least: Blocks to build at least.
        shiftable: Return at once where a shift would speed up convergence.
    """
    size, width = block.shape
    basis = block  # [N, d]
    projected = block.new_zeros(width * MAX_BLOCKS, width * MAX_BLOCKS)  # basis^T inverse basis
    while True:
        d = basis.shape[1]
        following = inverse.solve(block)
        for _ in range(2):
            part = basis.T @ following  # [d, p]
            following -= basis @ part
            projected[:d, d - width : d] += part
        projected[d - width : d, :d] = projected[:d, d - width : d].T
        block, corner = torch.linalg.qr(following)
        if d >= least * width:
            theta, Y = torch.linalg.eigh(projected[:d, :d])
            theta, Y = theta.flip(0), Y.flip(1)[:, :width]
            outside = corner @ Y[-width:]  # what the inverse of basis Y has along ``block``
            residuals = outside.norm(dim=0)
            sine2 = float((residuals[:r] / (theta[:r] - theta[width])).square().mean())
            values = inverse.shift + 1 / theta[:width]
            corrected = float(values[r - 1]) < noise
            done = sine2 <= (SINE2_BEFORE_CORRECTION if corrected else SINE2_TOLERANCE)
            full = d + width > min(size * MAX_SPACE_RATIO, width * MAX_BLOCKS)
            if done or full or (shiftable and is_clustered(values, r)):
                # one more inverse, for free: it damps what is left of the large eigenvalues
                vectors = torch.linalg.qr(basis @ Y + block @ (outside / theta[:width])).Q
                bound = float(inverse.shift + 1 / (theta[0] + residuals[0]))
                return Space(vectors, values, bound, sine2)
        basis = torch.cat([basis, block], dim=1)


def triplets_in(
    tall: Tall, inverse: ShiftedGram, space: Space, r: int, floor: float, corrections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the r smallest triplets of T from a space, and correct them until they are good.

    A correction adds to the space what the inverse makes of the residuals ``T^T u - s v``, which
    know nothing of the rounding of G. The same vectors remove from U what rounding in V left of
    the large singular directions: ``u = T v / s`` enlarges it by ``largest / s``.

    Args:
        tall: T [M, N].
        inverse: Factor of its shifted Gram matrix.
        space: Where to start.
        r: Number of triplets.
        floor: Residuals below it are rounding.
        corrections: How often to correct at least.

    Returns:
        U [M, r], S [r] descending and V [N, r].

    Raises:
        NotConvergedError: If the space misses part of the slice, or residuals stay too large.
    """
    if space.sine2 > SINE2_BEFORE_CORRECTION:  # as where some of the slice is 0 and some is not
        raise NotConvergedError(f"the Krylov space misses {space.sine2:.1e} of the slice")
    basis, kept = space.vectors, space.vectors.shape[1]
    image = tall.times(basis)
    for done in range(MAX_CORRECTIONS + 1):
        Q, R = torch.linalg.qr(image)  # by columns, so that small ones keep their accuracy
        left, S, right = torch.linalg.svd(R.double())
        U, S, right = Q @ left[:, -r:].float(), S[-r:].float(), right[-kept:].T.float()
        basis, image = basis @ right, image @ right
        V = basis[:, -r:]
        residual = tall.transposed_times(U) - V * S  # [N, r]
        last = done >= corrections
        if inverse.shift <= 0 or not last:
            correction = inverse.solve(residual)
        if inverse.shift <= 0:
            U = _orthonormal(U - tall.times(correction))
            residual = tall.transposed_times(U) - V * S if last else residual
        if last:
            if float(residual.norm()) <= max(RESIDUAL_TOLERANCE * float(S.norm()), floor):
                return U, S, V
            correction = inverse.solve(residual)
        for _ in range(2):
            correction = torch.linalg.qr(correction - basis @ (basis.T @ correction)).Q
        basis = torch.cat([correction, basis], dim=1)
        image = torch.cat([tall.times(correction), image], dim=1)
    relative = float(residual.norm()) / max(float(S.norm()), floor)
    raise NotConvergedError(f"relative residual {relative:.1e} after {MAX_CORRECTIONS} corrections")


def _orthonormal(columns: Tensor) -> Tensor:
    """Return nearly orthonormal columns made orthonormal, none of them turned around."""
    Q, R = torch.linalg.qr(columns)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
