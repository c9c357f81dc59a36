"""A slice of the singular value decomposition of one weight: pure tensor maths, no model."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor

from milora_vl.adapter.krylov_svd import NotConvergedError, krylov_minor_svd

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
    signs = _row_signs(Vh)
    return (U * signs).contiguous(), S.contiguous(), (Vh * signs[:, None]).contiguous()


def check_weight(weight: Tensor, r: int) -> None:
    """Refuse what cannot be decomposed at rank r.

    Args:
        weight: The matrix to check, [d_out, d_in].
        r: The wanted number of triplets.

    Raises:
        ValueError: If ``weight`` is not a finite floating-point matrix or ``r`` is out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix [d_out, d_in], got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"expected float weights, got {weight.dtype}; dequantise them first")
    if weight.element_size() < 2:  # the scales of such values are kept elsewhere
        raise ValueError(
            f"its weights are stored as {weight.dtype}, which means nothing without their scales; "
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


def slice_indices(rank: int, r: int, slice: Slice) -> Tensor:  # noqa: A002
    """Return the positions [r] of a slice in the descending spectrum of ``rank`` values."""
    if slice == "random":
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(rank, generator=generator, device="cpu")[:r].sort().values
    start = {"principal": 0, "middle": (rank - r) // 2, "minor": rank - r}[slice]
    return torch.arange(start, start + r, device="cpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 for a ``with`` block, whatever the process has allowed.

    Trainers switch on TF32, which keeps 10 bits, or autocast, which keeps 7: too few for factors
    that must multiply back to a slice of the weight, and different from run to run if the switch
    is.
    """
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _decompose(
    weight: Tensor,
    r: int,
    method: SvdMethod,
    slice: Slice,  # noqa: A002
) -> tuple[Tensor, Tensor, Tensor]:
    side = min(weight.shape)
    worthwhile = side >= KRYLOV_MIN_SIDE and r <= side * KRYLOV_MAX_RANK_RATIO
    if method == "krylov" and slice != "minor":
        logger.info("svd=krylov finds the minor slice only; the %s one is done exactly", slice)
    elif method == "krylov" or (method == "auto" and slice == "minor" and worthwhile):
        try:
            return krylov_minor_svd(weight, r)
        except (NotConvergedError, torch.linalg.LinAlgError) as reason:
            logger.info("%s: decomposing exactly, because %s", tuple(weight.shape), reason)
    return _exact(weight, r, slice)


def _exact(
    weight: Tensor,
    r: int,
    slice: Slice,  # noqa: A002
) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)  # [d_out, k], [k], [k, d_in]
    index = slice_indices(S.numel(), r, slice).to(weight.device)
    return U[:, index], S[index], Vh[index]


def _row_signs(Vh: Tensor) -> Tensor:
    """Return [r] of +1 or -1 that make the largest entry of each row of Vh positive."""
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0)
