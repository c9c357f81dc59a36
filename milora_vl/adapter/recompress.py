"""A plain LoRA of a smaller rank that is as near as possible to a saved one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from milora_vl.adapter.portable import PREFIX
from milora_vl.adapter.state import MiloraState


@dataclass(frozen=True)
class Truncation:
    """What one layer loses at the smaller rank, in the Frobenius norm.

    Attributes:
        name: Full module name.
        norm: Norm of what the adapter adds to the weight.
        error: Norm of the part that is cut off.
        error_ratio: error / norm; 0 where the adapter adds nothing.
    """

    name: str
    norm: float
    error: float
    error_ratio: float


def recompress(
    lora_A: Tensor, lora_B: Tensor, scaling: float, r: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best factors of rank r of ``scaling * lora_B @ lora_A``, and all singular values.

    The product [d_out, d_in] is never formed: both factors are brought to triangular form, and
    only the small core between them is decomposed (Eckart-Young, in float64).

    Args:
        lora_A: [k, d_in].
        lora_B: [d_out, k].
        scaling: Factor before the product, dimensionless.
        r: Wanted rank, at least 1. Beyond the rank of the product the factors are padded with 0.

    Returns:
        lora_A [r, d_in] and lora_B [d_out, r] in float32, whose product needs no scaling; and the
        singular values of the whole product, descending.
    """
    left = torch.linalg.qr(lora_B.double())  # Q [d_out, k'], R [k', k]
    right = torch.linalg.qr(lora_A.double().T)
    U, S, Vh = torch.linalg.svd(scaling * left.R @ right.R.T, full_matrices=False)
    kept = min(r, S.numel())
    root = S[:kept].sqrt()
    A = lora_A.new_zeros(r, lora_A.shape[1], dtype=torch.float32)
    B = lora_B.new_zeros(lora_B.shape[0], r, dtype=torch.float32)
    A[:kept] = (root[:, None] * (Vh[:kept] @ right.Q.T)).float()
    B[:, :kept] = (left.Q @ (U[:, :kept] * root)).float()
    return A, B, S


def recompress_tensors(
    tensors: dict[str, Tensor], state: MiloraState, r: int
) -> tuple[dict[str, Tensor], MiloraState, list[Truncation]]:
    """Recompress every layer of a portable adapter.

    Args:
        tensors: As ``milora_vl.adapter.portable.portable_tensors`` returns them.
        state: Of the same adapter.
        r: The new rank.

    Returns:
        Tensors and state of a plain LoRA (scaling 1), and what each layer loses.

    Raises:
        ValueError: If r is out of range, or the adapter is a DoRA.
    """
    if state.init == "dora":
        raise ValueError(
            "DoRA also rescales the rows of the weights, which no LoRA of small rank does; export "
            "it as it is (--form lora) or merged (--form merged)"
        )
    largest = state.widening * state.r
    if not 1 <= r <= largest:
        raise ValueError(f"--rank {r} is out of range: this adapter has rank {largest}")
    small, losses = dict(tensors), []
    for name in state.modules:
        key_A, key_B = (f"{PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
        A, B, S = recompress(tensors[key_A], tensors[key_B], state.scaling, r)
        small[key_A], small[key_B] = A.contiguous(), B.contiguous()
        norm, error = float(S.norm()), float(S[r:].norm())
        losses.append(Truncation(name, norm, error, error / norm if norm > 0 else 0.0))
    changes = {"r": r, "lora_alpha": float(r), "init": "lora", "slice": "none"}
    return small, MiloraState(**{**vars(state), **changes, "residual": "anchor"}), losses


def truncation_report(losses: Sequence[Truncation], r: int, r_before: int) -> dict[str, Any]:
    """Return the losses of all layers, and of the adapter as a whole, for JSON."""
    norm = sum(loss.norm**2 for loss in losses) ** 0.5
    error = sum(loss.error**2 for loss in losses) ** 0.5
    return {
        "rank": r,
        "rank_before": r_before,
        "norm": norm,
        "error": error,
        "error_ratio": error / norm if norm > 0 else 0.0,
        "layers": [asdict(loss) for loss in losses],
    }


def summarise(report: dict[str, Any]) -> str:
    """Return the report in two lines: the whole adapter, and the layer that loses most."""
    worst = max(report["layers"], key=lambda layer: layer["error_ratio"])
    return (
        f"rank {report['rank_before']} -> {report['rank']}: the cut leaves out "
        f"{100 * report['error_ratio']:.2f} % of what the adapter adds to the weights (Frobenius "
        f"norm {report['error']:.3e} of {report['norm']:.3e})\n"
        f"largest share: {100 * worst['error_ratio']:.2f} % in {worst['name']}"
    )
