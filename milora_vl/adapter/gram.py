"""The Gram matrix of a weight and its shifted inverse, in blocks that suit fast products."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 384
PACK_MIN = 64  # smallest side for which packing pays
LARGEST_ITERATIONS = 5
LARGEST_COLUMNS = 4
EPSILON = torch.finfo(torch.float32).eps


def pack(rows: Tensor) -> Tensor:
    """Return ``rows`` [m, k] in the layout that ``multiply`` is fastest on.

    On the CPU that is oneDNN's: its float32 product uses the widest vectors of every make of CPU,
    the default one of some makes only.
    """
    fast = rows.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if fast and min(rows.shape) >= PACK_MIN:
        return rows.contiguous().to_mkldnn()
    return rows


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T [m, n] of two matrices [m, k] and [n, k], packed or not.

    Pack the larger one first: the right one is laid out anew in every call.
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


def factorise(gram: Tensor, shift: float) -> ShiftedGram | None:
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
