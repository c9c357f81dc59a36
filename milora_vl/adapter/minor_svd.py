"""A slice of the singular value decomposition of one weight: pure tensor maths, no model.

The smallest triplets of a large matrix T are found without its full decomposition:

1. The Gram matrix G = T^T T of the short side is factorized as ``G - shift I = L L^T``.
2. A block Krylov space of the inverse holds the wanted directions after a few solves: the smallest
   eigenvalues of G are the largest of its inverse, which such a space finds first.
3. The triplets are computed from T on the best directions of that space, not from G: the squares of
   small singular values are lost in the rounding of G.
4. Where rounding could have changed the directions too, residuals of T correct them.

Products run in blocks that suit the fastest kernels. Other slices, and matrices on which this does
not converge, are decomposed exactly.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from milora_vl.runtime import full_precision, to_float64

BLOCK = 384
PACK_MIN = 64  # smallest side for which packing pays
LARGEST_ITERATIONS = 5
LARGEST_COLUMNS = 4
EPSILON = torch.finfo(torch.float32).eps


def pack(rows: Tensor) -> Tensor:
    """Return ``rows`` [m, k] in the layout that is fastest for ``multiply``.

    On the CPU that is oneDNN's, whose float32 product uses the widest vectors of every CPU; torch's
    default product does so on some CPUs only.
    """
    fast = rows.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if fast and min(rows.shape) >= PACK_MIN:
        return rows.contiguous().to_mkldnn()
    return rows


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T [m, n] of two matrices [m, k] and [n, k], packed or not.

    Pass the larger one as ``left``, packed: the right one is packed again in every call.
    """
    if left.is_mkldnn != right.is_mkldnn:
        left, right = (x if x.is_mkldnn else pack(x) for x in (left, right))
        if left.is_mkldnn != right.is_mkldnn:  # one is too small to be packed
            left, right = (x.to_dense() if x.is_mkldnn else x for x in (left, right))
    product = torch.nn.functional.linear(left, right)
    return product.to_dense() if product.is_mkldnn else product


def _spans(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


class Tall:
    """A matrix T [M, N], M >= N, packed for products from either side.

    Args:
        values: T, float32.
    """

    def __init__(self, values: Tensor) -> None:
        """Pack T."""
        wide = values.T.contiguous()
        self.columns = values.shape[1]
        self._rows = pack(values)
        self._panels = [pack(wide[start:end]) for start, end in _spans(self.columns)]

    def times(self, block: Tensor) -> Tensor:
        """Return T block, [M, b]."""
        return multiply(self._rows, block.T)

    def transposed_times(self, block: Tensor) -> Tensor:
        """Return T^T block, [N, b]."""
        right = pack(block.T)
        return torch.cat([multiply(panel, right) for panel in self._panels])

    def gram(self) -> Tensor:
        """Return T^T T [N, N], from products of pairs of column panels, each pair once."""
        spans = _spans(self.columns)
        blocks: dict[tuple[int, int], Tensor] = {}
        for i, left in enumerate(self._panels):
            for j, right in enumerate(self._panels[: i + 1]):
                blocks[i, j] = multiply(left, right)
        gram = torch.empty(
            self.columns, self.columns, dtype=blocks[0, 0].dtype, device=blocks[0, 0].device
        )
        for (i, j), block in blocks.items():
            gram[slice(*spans[i]), slice(*spans[j])] = block
            gram[slice(*spans[j]), slice(*spans[i])] = block.T
        return gram


@dataclass(frozen=True)
class ShiftedGram:
    """A Cholesky factor of G - shift I in blocks, packed for solves.

    Attributes:
        corners: The diagonal blocks, lower triangular, each [b, b].
        rows: The part of the factor left of each diagonal block, [b, start]; None for the first.
        columns: The transposed part below each diagonal block, [b, N - end]; None for the last.
        shift: Below the smallest eigenvalue of G; negative where rounding made that necessary.
    """

    corners: tuple[Tensor, ...]
    rows: tuple[Tensor | None, ...]
    columns: tuple[Tensor | None, ...]
    shift: float

    def solve(self, block: Tensor) -> Tensor:
        """Return (G - shift I)^-1 block, [N, b]."""
        solution = block.clone()
        steps = list(
            zip(_spans(block.shape[0]), self.corners, self.rows, self.columns, strict=True)
        )
        for (start, end), corner, rows, _ in steps:
            part = solution[start:end]
            if rows is not None:
                part = part - multiply(rows, solution[:start].T)
            solution[start:end] = torch.linalg.solve_triangular(corner, part, upper=False)
        for (start, end), corner, _, columns in reversed(steps):
            part = solution[start:end]
            if columns is not None:
                part = part - multiply(columns, solution[end:].T)
            solution[start:end] = torch.linalg.solve_triangular(corner.T, part, upper=True)
        return solution


def factorize(gram: Tensor, shift: float) -> ShiftedGram | None:
    """Return the Cholesky factor of G - shift I, or None if that is not positive definite."""
    size = gram.shape[0]
    lower = torch.empty_like(gram)  # its blocks on and above the diagonal are never read
    corners, all_rows, all_columns = [], [], []
    for start, end in _spans(size):
        column = gram[start:, start:end].clone()  # [N - start, b]
        rows = pack(lower[start:end, :start]) if start else None
        if rows is not None:
            column[: end - start] -= multiply(rows, rows)
            if end < size:
                column[end - start :] -= multiply(pack(lower[end:, :start]), rows)
        diagonal = column[: end - start]
        diagonal.diagonal().sub_(shift)
        corner, info = torch.linalg.cholesky_ex(diagonal)
        if int(info) != 0 or not torch.isfinite(corner).all():
            return None
        columns = None
        if end < size:
            identity = torch.eye(end - start, dtype=gram.dtype, device=gram.device)
            inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
            below = multiply(pack(column[end - start :]), inverse)  # [N - end, b]
            lower[end:, start:end] = below
            columns = pack(below.T)
        corners.append(corner)
        all_rows.append(rows)
        all_columns.append(columns)
    return ShiftedGram(tuple(corners), tuple(all_rows), tuple(all_columns), shift)


def from_lower(lower: Tensor, shift: float) -> ShiftedGram:
    """Pack a lower Cholesky factor [N, N] that was made elsewhere; what is above is not read."""
    spans = _spans(lower.shape[0])
    return ShiftedGram(
        tuple(lower[start:end, start:end].tril() for start, end in spans),
        tuple(pack(lower[start:end, :start]) if start else None for start, end in spans),
        tuple(
            pack(lower[end:, start:end].T) if end < lower.shape[0] else None for start, end in spans
        ),
        shift,
    )


def largest_eigenvalue(gram: Tensor, block: Tensor) -> float:
    """Estimate the largest eigenvalue of G from below, by power iteration on ``block`` [N, b]."""
    for _ in range(LARGEST_ITERATIONS):
        block = torch.linalg.qr(gram @ block).Q
    return float((block * (gram @ block)).sum(dim=0).max())


FIRST_BLOCKS = 3  # of the space that locates the smallest eigenvalues
SHIFTED_BLOCKS = 2  # at least, of the space of the shifted inverse
MAX_BLOCKS = 9
MAX_LIFTS = 6
MAX_SHIFTS = 3
MAX_CORRECTIONS = 3
MAX_SPACE_RATIO = 2 / 3  # of the short side; beyond, the exact method is as fast
NOISE_RATIO = 1e4  # eigenvalues of G below this many roundings of the largest are not trusted
DROWNED_RATIO = 4  # below this many, they are only rounding
CLUSTERED_RATIO = 0.05  # smallest over largest eigenvalue of the slice, from where shifting pays
SINE2_TOLERANCE = 1e-4  # mean squared sine between slice and space, before the last improvements
SINE2_BEFORE_CORRECTION = 1e-3
RESIDUAL_TOLERANCE = 0.015  # relative to the wanted singular values
RESIDUAL_ROUNDINGS = 50  # of the largest singular value, below which residuals are only rounding
ORTHOGONALITY_TOLERANCE = 1e-4
SMALLEST_SCALE = 1e-8


class NotConvergedError(ArithmeticError):
    """The Krylov method does not reach its accuracy on this matrix; the exact method does."""


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
        NotConvergedError: If the space would not be small, the matrix cannot be factorized in
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
    width = r + max(16, r // 4)  # a few more than wanted, so that the edge of the slice converges
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
    inverse = factorize_lifted(gram, largest)
    start = torch.linalg.qr(_random_block(gram, width)).Q
    space = expand(inverse, start, r, noise, least=FIRST_BLOCKS, shiftable=True)
    if float(space.values[r - 1]) < DROWNED_RATIO * EPSILON * largest:
        # they are lost in the rounding of G, so factorize G without squaring T
        del inverse
        inverse = factorize_finely(weight)
        space = expand(inverse, start, r, noise, least=FIRST_BLOCKS)
    elif space.sine2 > SINE2_TOLERANCE and is_clustered(space.values, r):
        del inverse  # as large as G
        inverse = shift_towards(gram, space, r, largest) or factorize_lifted(gram, largest)
        space = expand(inverse, space.vectors, r, noise, least=SHIFTED_BLOCKS)
    return inverse, space


def factorize_lifted(gram: Tensor, largest: float) -> ShiftedGram:
    """Factorize G, lifted by as little as its rounding needs.

    Raises:
        NotConvergedError: If no small lift makes it positive definite.
    """
    lift = EPSILON * largest
    for _ in range(MAX_LIFTS):
        if (inverse := factorize(gram, -lift)) is not None:
            return inverse
        lift *= 4
    raise NotConvergedError("the Gram matrix is not positive definite in float32")


def factorize_finely(tall: Tensor) -> ShiftedGram:
    """Factorize G = T^T T as R^T R from a QR decomposition of T.

    Raises:
        NotConvergedError: If T is singular in float32.
    """
    R = torch.linalg.qr(tall, mode="r").R  # [N, N]
    if not float(R.diagonal().abs().min()) > 0:
        raise NotConvergedError("the matrix is singular")
    return from_lower(R.T.contiguous(), 0.0)


def is_clustered(values: Tensor, r: int) -> bool:
    """Return whether the r smallest eigenvalues are far from zero and close to each other.

    So they are in tall matrices; the unshifted inverse then hardly separates them.
    """
    return float(values[0]) > CLUSTERED_RATIO * float(values[r - 1])


def shift_towards(gram: Tensor, space: Space, r: int, largest: float) -> ShiftedGram | None:
    """Factorize G with the shift just under its smallest eigenvalue, where that pays."""
    smallest, edge = float(space.values[0]), float(space.values[r - 1])
    # The nearer the shift, the faster the convergence. It stays below the smallest eigenvalue by
    # the error of its estimate, a part of the slice's width and the rounding of G, because the
    # Cholesky factor exists only below; where it still fails, the gap doubles.
    gap = max(smallest - space.bound, 0.05 * (edge - smallest), 16 * EPSILON * largest)
    for _ in range(MAX_SHIFTS):
        if smallest - gap <= 0:
            return None
        if (inverse := factorize(gram, smallest - gap)) is not None:
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
        noise: Eigenvalues of G below it are not trusted; they are corrected later, so a coarser
            space is enough.
        least: Blocks to build at least.
        shiftable: Return at once where a shift would speed up convergence.
    """
    size, width = block.shape
    basis = block  # [N, d]
    projected = block.new_zeros(width * MAX_BLOCKS, width * MAX_BLOCKS)  # basis^T inverse basis
    while True:
        d = basis.shape[1]
        following = inverse.solve(block)
        for _ in range(2):  # after once, float32 rounding leaves parts of the old directions
            part = basis.T @ following  # [d, p]
            following -= basis @ part
            # what is removed is basis^T inverse block: the new columns of the projection
            projected[:d, d - width : d] += part
        projected[d - width : d, :d] = projected[:d, d - width : d].T
        block, corner = torch.linalg.qr(following)
        if d >= least * width:
            # Rayleigh-Ritz: theta approximates 1 / (eigenvalue of G - shift), largest first
            theta, Y = torch.linalg.eigh(projected[:d, :d])
            theta, Y = theta.flip(0), Y.flip(1)[:, :width]
            outside = corner @ Y[-width:]  # what the inverse of basis Y has along ``block``
            residuals = outside.norm(dim=0)
            # Davis-Kahan: residual over the gap to the first unwanted value bounds the sine
            sine2 = float((residuals[:r] / (theta[:r] - theta[width])).square().mean())
            values = inverse.shift + 1 / theta[:width]
            corrected = float(values[r - 1]) < noise
            done = sine2 <= (SINE2_BEFORE_CORRECTION if corrected else SINE2_TOLERANCE)
            full = d + width > min(size * MAX_SPACE_RATIO, width * MAX_BLOCKS)
            if done or full or (shiftable and is_clustered(values, r)):
                # one more inverse at no cost: it damps the remaining large eigenvalues
                vectors = torch.linalg.qr(basis @ Y + block @ (outside / theta[:width])).Q
                bound = float(inverse.shift + 1 / (theta[0] + residuals[0]))
                return Space(vectors, values, bound, sine2)
        basis = torch.cat([basis, block], dim=1)


def triplets_in(
    tall: Tall, inverse: ShiftedGram, space: Space, r: int, floor: float, corrections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the r smallest triplets of T from a space, and correct them until they are good.

    A correction applies the inverse to the residuals ``T^T u - s v``, which do not suffer from the
    rounding of G, and adds the result to the space. The same vectors remove from U the parts of
    large singular directions that rounding left in V: ``u = T v / s`` enlarges them by
    ``largest / s``.

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
    if space.sine2 > SINE2_BEFORE_CORRECTION:  # for example if part of the slice is exactly 0
        raise NotConvergedError(f"the Krylov space misses {space.sine2:.1e} of the slice")
    basis, kept = space.vectors, space.vectors.shape[1]
    image = tall.times(basis)
    for done in range(MAX_CORRECTIONS + 1):
        Q, R = torch.linalg.qr(image)  # column by column, so small columns keep their accuracy
        # R is small, so float64 costs nothing; float32 would lose values far below the largest
        left, S, right = torch.linalg.svd(to_float64(R))
        U, S, right = Q @ left[:, -r:].to(Q), S[-r:].to(Q), right[-kept:].T.to(Q)
        basis, image = basis @ right, image @ right
        V = basis[:, -r:]
        residual = tall.transposed_times(U) - V * S  # [N, r]
        last = done >= corrections
        if inverse.shift <= 0 or not last:
            correction = inverse.solve(residual)
        if inverse.shift <= 0:  # gives U = S T^-T V, which damps what T V / S enlarges
            U = _orthonormal(U - tall.times(correction))
            residual = tall.transposed_times(U) - V * S if last else residual
        if last:
            if float(residual.norm()) <= max(RESIDUAL_TOLERANCE * float(S.norm()), floor):
                return U, S, V
            correction = inverse.solve(residual)
        for _ in range(2):  # as in ``expand``
            correction = torch.linalg.qr(correction - basis @ (basis.T @ correction)).Q
        basis = torch.cat([correction, basis], dim=1)
        image = torch.cat([tall.times(correction), image], dim=1)
    relative = float(residual.norm()) / max(float(S.norm()), floor)
    raise NotConvergedError(f"relative residual {relative:.1e} after {MAX_CORRECTIONS} corrections")


def _orthonormal(columns: Tensor) -> Tensor:
    """Make nearly orthonormal columns orthonormal, without changing their signs."""
    Q, R = torch.linalg.qr(columns)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


logger = logging.getLogger(__name__)

Slice = Literal["minor", "principal", "middle", "random"]
SvdMethod = Literal["auto", "exact", "krylov"]

SLICES: tuple[str, ...] = ("minor", "principal", "middle", "random")
SVD_METHODS: tuple[str, ...] = ("auto", "exact", "krylov")
KRYLOV_MIN_SIDE = 512
KRYLOV_MAX_RANK_RATIO = 1 / 8


def minor_svd(
    weight: Tensor,
    r: int,
    method: SvdMethod = "auto",
    slice: Slice = "minor",  # noqa: A002 - the word of the configuration key
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute r singular triplets of a weight, by default those of the smallest singular values.

    With ``weight = U diag(S) Vh``, S descending, ``minor`` takes the last r triplets
    (MiLoRA, arXiv:2406.09044), ``principal`` the first r (PiSSA, arXiv:2404.02948), ``middle`` r
    around the median and ``random`` r drawn with a fixed seed. The signs are fixed: in every row of
    ``Vh`` the entry of largest magnitude is positive, so that equal weights give equal factors.

    Args:
        weight: [d_out, d_in], float32, bfloat16 or float16, on any device; not modified.
        r: Number of triplets, 1 <= r <= min(d_out, d_in).
        method: ``exact`` is ``torch.linalg.svd`` in float32. ``krylov`` is several times faster for
            the minor slice of a large matrix; it checks its own residuals and orthogonality and
            falls back to ``exact``, with the reason logged. ``auto`` chooses by shape.
        slice: Which part of the spectrum to return.

    Returns:
        U [d_out, r], S [r] descending and Vh [r, d_in] in float32, on the device of ``weight``.

    Raises:
        ValueError: If ``weight`` is not a finite float matrix, ``r`` is out of range, or ``method``
            or ``slice`` is unknown.
    """
    check_weight(weight, r)
    if slice not in SLICES:
        raise ValueError(f"slice={slice!r} is unknown; choose one of {', '.join(SLICES)}")
    if method not in SVD_METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(SVD_METHODS)}")
    with full_precision():
        U, S, Vh = _decompose(weight.detach().to(torch.float32), r, method, slice)
    signs = row_signs(Vh)
    return (U * signs).contiguous(), S.contiguous(), (Vh * signs[:, None]).contiguous()


def check_weight(weight: Tensor, r: int) -> None:
    """Refuse a weight that cannot be decomposed at rank r.

    Args:
        weight: The matrix to check, [d_out, d_in].
        r: The wanted number of triplets.

    Raises:
        ValueError: If ``weight`` is not a finite floating-point matrix or ``r`` is out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix [d_out, d_in], got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"expected float weights, got {weight.dtype}; dequantize them first")
    if weight.element_size() < 2:  # such values have separate scales
        raise ValueError(
            f"its weights are stored as {weight.dtype}, which is useless without their scales; "
            "load the checkpoint in bfloat16, or in 4 bits from a float one (quantization='nf4')"
        )
    if not 1 <= r <= min(weight.shape):
        raise ValueError(
            f"r={r} is out of range for shape {tuple(weight.shape)}; use 1 to {min(weight.shape)}"
        )
    total = weight.sum(dtype=torch.float32)  # one quick pass; it is finite if all values are small
    if not torch.isfinite(total) and not torch.isfinite(weight).all():
        n_bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"{n_bad} of {weight.numel()} values are NaN or infinite")


def uses_krylov(side: int, r: int, method: str) -> bool:
    """Return whether the minor slice of a matrix is found by the Krylov method.

    Args:
        side: The shorter side of the matrix.
        r: Number of triplets.
        method: As for ``minor_svd``.
    """
    pays = side >= KRYLOV_MIN_SIDE and r <= side * KRYLOV_MAX_RANK_RATIO
    return method == "krylov" or (method == "auto" and pays)


def slice_indices(rank: int, r: int, slice: Slice) -> Tensor:  # noqa: A002
    """Return the positions [r] of a slice in the descending spectrum of ``rank`` values."""
    if slice == "random":
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(rank, generator=generator, device="cpu")[:r].sort().values
    start = {"principal": 0, "middle": (rank - r) // 2, "minor": rank - r}[slice]
    return torch.arange(start, start + r, device="cpu")


def _decompose(
    weight: Tensor,
    r: int,
    method: SvdMethod,
    slice: Slice,  # noqa: A002
) -> tuple[Tensor, Tensor, Tensor]:
    if method == "krylov" and slice != "minor":
        logger.info("svd=krylov finds the minor slice only; the %s one is done exactly", slice)
    elif slice == "minor" and uses_krylov(min(weight.shape), r, method):
        try:
            return krylov_minor_svd(weight, r)
        except (NotConvergedError, torch.linalg.LinAlgError) as reason:
            logger.info("%s: decomposing exactly, because %s", tuple(weight.shape), reason)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)  # [d_out, k], [k], [k, d_in]
    index = slice_indices(S.numel(), r, slice).to(weight.device)
    return U[:, index], S[index], Vh[index]


def row_signs(Vh: Tensor) -> Tensor:
    """Return [r] of +1 or -1 that make the largest entry of each row of Vh positive."""
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0)
