"""How far training has moved the weights, and how much of that in their strongest directions.

The update of a layer is D = s (B A - B0 A0) = s [(B - B0) A + B0 (A - A0)]. It is never formed: its
norm, and that of its part in a few directions, come from products of m x m with m = 2r. What is
needed of W is computed once: its norm, and its strongest singular directions by a few block power
steps on W itself, in residual "subtract" on W_p + s B0 A0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from milora_vl.adapter.quantized import dense_weight
from milora_vl.adapter.state import (
    anchor_of,
    current_adapter,
    factors,
    lora_layer,
    recall,
)
from milora_vl.runtime import full_precision, to_float64

DIRECTIONS = 16
OVERSAMPLING = 8
POWER_STEPS = 3
DIGITS = 4  # significant ones, in files


@dataclass(frozen=True)
class _Reference:
    """What stays the same of one layer: ||W||, and left [d_out, k], right [d_in, k] directions."""

    norm: float
    left: Tensor
    right: Tensor


class UpdateMeter:
    """Measures the update of a live model's active adapter, again and again.

    Args:
        peft_model: From ``attach_milora`` or ``load_adapter``; its weights are read here once.

    DoRA rescales rows besides, and layers whose weight is no matrix have no singular directions:
    they are skipped.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        """See the class."""
        self.model, self.state = peft_model, recall(peft_model)
        self.adapter_name = current_adapter(peft_model)
        names = () if self.state.init == "dora" else self.state.peft_targets()["target_modules"]
        with torch.no_grad(), full_precision():
            self.references = {
                name: self._reference(name)
                for name in names
                if isinstance(self._weight(name), Tensor) and self._dense(name)
            }

    def _weight(self, name: str) -> Any:
        return getattr(lora_layer(self.model, name).get_base_layer(), "weight", None)

    def _dense(self, name: str) -> bool:
        lora_A, lora_B = factors(self.model, name, self.adapter_name)
        return lora_A.ndim == lora_B.ndim == 2

    def _reference(self, name: str) -> _Reference:
        weight = dense_weight(lora_layer(self.model, name).get_base_layer())  # [d_out, d_in]
        if self.state.has_anchor and self.state.residual == "subtract":
            A0, B0 = self._start(name)
            weight.addmm_(B0, A0, alpha=self._scaling(name))
        k = max(1, min(DIRECTIONS, min(weight.shape) // 4))
        left, right = strongest_directions(weight, k)
        return _Reference(float(weight.norm()), left, right)

    def _scaling(self, name: str) -> float:
        return lora_layer(self.model, name).scaling[self.adapter_name]

    def _start(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A0 and B0 where the layer is."""
        A, _ = factors(self.model, name, self.adapter_name)
        A0, negative_B0 = factors(self.model, name, anchor_of(self.adapter_name))
        return A0.detach().to(A.device), -negative_B0.detach().to(A.device)

    def _product(self, name: str) -> tuple[Tensor, Tensor]:
        """Return L [d_out, m] and R [m, d_in] with L R = D, free of cancellation."""
        A, B = (one.detach().float() for one in factors(self.model, name, self.adapter_name))
        scaling = self._scaling(name)
        if not self.state.has_anchor:
            return scaling * B, A
        A0, B0 = self._start(name)
        return scaling * torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0], dim=0)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Measure now.

        Returns:
            ``update_norm_ratio``: ||D|| / ||W|| over all layers together.
            ``update_principal_share``: share of ||D||^2 in the strongest directions, the mean of
            the input and the output side. ``update_principal_share_if_random``: what an update
            without any preference would have. ``update_norm_ratios``, ``update_principal_shares``:
            both by layer, in the order of the certificate. Empty if there is no layer to measure.
        """
        if not self.references:
            return {}
        rows = []
        with full_precision():
            for name, reference in self.references.items():
                squared, inside = squared_norms(
                    *self._product(name), reference.left, reference.right
                )
                d_out, d_in = reference.left.shape[0], reference.right.shape[0]
                random = reference.left.shape[1] * (1 / d_out + 1 / d_in) / 2
                rows.append((squared, inside, reference.norm**2, random))
        total, inside, weights = (sum(row[i] for row in rows) for i in range(3))
        return {
            "update_norm_ratio": _short(_ratio(total, weights) ** 0.5),
            "update_principal_share": _short(_ratio(inside, total)),
            "update_principal_share_if_random": _short(sum(row[3] for row in rows) / len(rows)),
            "update_norm_ratios": [_short(_ratio(row[0], row[2]) ** 0.5) for row in rows],
            "update_principal_shares": [_short(_ratio(row[1], row[0])) for row in rows],
        }


def strongest_directions(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return about the first k left [d_out, k] and right [d_in, k] singular vectors of a matrix.

    Block power iteration, with a few vectors more than are kept; the same every time.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(k + OVERSAMPLING, *weight.shape)
    right = torch.randn(weight.shape[1], width, generator=generator).to(weight)
    for _ in range(POWER_STEPS):
        left = torch.linalg.qr(weight @ right).Q
        right = torch.linalg.qr(weight.T @ left).Q  # [d_in, width]
    left, _, small = torch.linalg.svd(weight @ right, full_matrices=False)
    return left[:, :k].contiguous(), (right @ small.T)[:, :k].contiguous()


def squared_norms(L: Tensor, R: Tensor, left: Tensor, right: Tensor) -> tuple[float, float]:
    """Return ||D||^2 and its part in some directions, for D = L R.

    Args:
        L: [d_out, m].
        R: [m, d_in].
        left: Orthonormal columns [d_out, k].
        right: Orthonormal columns [d_in, k].

    Returns:
        ||D||^2, and (||left^T D||^2 + ||D right||^2) / 2.
    """
    outer, inner = to_float64(L.T @ L), to_float64(R @ R.T)  # [m, m]
    out_side, in_side = to_float64(left.T @ L), to_float64(R @ right)  # [k, m], [m, k]
    squared = float((outer * inner).sum())
    written = float(((out_side.T @ out_side) * inner).sum())
    read = float((outer * (in_side @ in_side.T)).sum())
    return max(squared, 0.0), max((written + read) / 2, 0.0)


def summarize_update(
    entry: Mapping[str, Any], names: Sequence[str]
) -> tuple[str, list[tuple[str, float, float]]]:
    """Return one line for people on a measurement, and the layers that moved most.

    Args:
        entry: What ``UpdateMeter.measure`` returned.
        names: Of the certificate's layers.
    """
    line = (
        f"the update is {100 * entry['update_norm_ratio']:.3g} % of the weights' norm; "
        f"{100 * entry['update_principal_share']:.3g} % of it lies in their {DIRECTIONS} strongest "
        f"directions ({100 * entry['update_principal_share_if_random']:.2g} % if it had no "
        "preference)"
    )
    shares = entry["update_principal_shares"]
    rows = list(zip(names, entry["update_norm_ratios"], shares, strict=False))
    return line, sorted(rows, key=lambda row: -row[1])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
