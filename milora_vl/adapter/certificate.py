"""Measurements of what the initialization did to the model, per layer and as a whole."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_vl.files import write_json_atomic
from milora_vl.runtime import to_float64


@dataclass(frozen=True)
class LayerCertificate:
    """Measurements of one layer; ``_ratio`` is relative to the Frobenius norm of the weight.

    Attributes:
        name: Full module name in the base model.
        shape: (d_out, d_in).
        r: Adapter rank.
        reconstruction_error_ratio: ||W - (W_p + s B0 A0)|| / ||W|| with W_p as stored; 0 in anchor
            mode, where W itself is kept.
        minor_norm_ratio: ||s B0 A0|| / ||W||.
        minor_energy_ratio: Its square.
        rounding_loss_ratio: ||W_p as stored - W_p|| / ||W||; 0 in anchor mode.
        rounding_loss_if_subtracted_ratio: The same, had W_p been stored in the dtype of the weight;
            None for quantized weights.
        svd_residual_ratio: The larger of ||W V - U S|| and ||W^T U - V S||, over ||W||. About 1e-6
            if exact; up to 1e-2 from the Krylov method, whose slice then mixes a little with its
            neighbors in the spectrum. 0 for methods that do not decompose the weight; their
            singular values below are those of s B0 A0.
        sigma_max: Largest singular value in the slice.
        sigma_min: Smallest singular value in the slice.
        zero_directions: Triplets whose factors are both zero; they never get a gradient.
        input_energy_ratio: With init "null_space": share of the calibration inputs' energy inside
            the adapter's subspace (r / d_in for random inputs). None for other methods.
        quantization_error_ratio: ||NF4(W_p) - W_p|| / ||W|| where W_p is kept in 4 bits, else None.
            Compare it with ``minor_norm_ratio``: is the slice larger than the noise?
    """

    name: str
    shape: tuple[int, int]
    r: int
    reconstruction_error_ratio: float
    minor_norm_ratio: float
    minor_energy_ratio: float
    rounding_loss_ratio: float
    rounding_loss_if_subtracted_ratio: float | None
    svd_residual_ratio: float
    sigma_max: float
    sigma_min: float
    zero_directions: int
    input_energy_ratio: float | None = None
    quantization_error_ratio: float | None = None

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "LayerCertificate":
        """Read what ``asdict`` returned, also with older spellings of the keys."""
        names = {key.replace("quantisation", "quantization"): item for key, item in value.items()}
        return cls(**{**names, "shape": tuple(names["shape"])})


@dataclass(frozen=True)
class Certificate:
    """The init certificate of an attached adapter.

    Attributes:
        layers: One entry per adapted layer.
        matched: Part of the model -> full names that train ("language_model", "projector").
        skipped: Full name -> reason, for language-model layers left without an adapter.
        residual: "subtract" or "anchor".
        slice: Part of the spectrum the adapter starts from; "none" for other methods.
        svd: Requested SVD method.
        r: Adapter rank.
        scaling: lora_alpha / r.
        seconds: Wall time of attaching, with the decompositions.
        peak_memory_gib: Highest resident memory of the process seen while attaching.
        peak_cuda_memory_gib: Highest CUDA allocation, or None without CUDA.
        trainable_parameters: Number of parameters that train.
        total_parameters: Number of parameters of the base model.
        step0_max_abs_logit_difference: Largest logit change on the given batch, or None.
        step0_max_abs_logit: Largest logit of the base model on that batch.
        step0_relative_logit_difference: The difference over the largest logit; 1e-6 to 1e-5 is
            what rounding alone does to a deep float32 model.
        init: Method that gave the adapter its first values.
        scale: "none" if the factors are orthonormal, without the singular values.
    """

    layers: tuple[LayerCertificate, ...]
    matched: dict[str, list[str]]
    skipped: dict[str, str]
    residual: str
    slice: str
    svd: str
    r: int
    scaling: float
    seconds: float
    peak_memory_gib: float
    peak_cuda_memory_gib: float | None
    trainable_parameters: int
    total_parameters: int
    step0_max_abs_logit_difference: float | None = None
    step0_max_abs_logit: float | None = None
    step0_relative_logit_difference: float | None = None
    warnings: list[str] = field(default_factory=list)
    init: str = "milora"
    scale: str = "singular"

    def to_json(self, path: Path | str | None = None) -> str:
        """Return the certificate as JSON text; with ``path``, write it there too (atomically).

        Raises:
            OSError: If ``path`` cannot be written.
        """
        value = asdict(self)
        if path is not None:
            write_json_atomic(path, value)
        return json.dumps(value, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Certificate":
        """Read what ``to_json`` returned."""
        value: dict[str, Any] = json.loads(text)
        layers = [LayerCertificate.from_dict(x) for x in value["layers"]]
        names = {item.name for item in fields(cls)}
        rest = {key: item for key, item in value.items() if key in names and key != "layers"}
        return cls(layers=tuple(layers), **rest)

    def summary(self) -> str:
        """Return a short table: one line per kind of layer (mean over the model), then totals."""
        lines = [
            f"init={self.init} slice={self.slice} r={self.r} scaling={self.scaling:g} "
            f"residual={self.residual} svd={self.svd}"
            f"{'' if self.scale == 'singular' else f' scale={self.scale}'}",
            f"{'layer kind':<14}{'n':>4}  {'shape':>13}  {'minor/W':>9}  {'error/W':>9}  "
            f"{'rounding/W':>10}  {'NF4/W':>9}  {'sigma range':>19}",
        ]
        kinds: dict[tuple[str, tuple[int, int]], list[LayerCertificate]] = {}
        for layer in self.layers:
            kinds.setdefault((layer.name.rpartition(".")[2], layer.shape), []).append(layer)
        for (kind, shape), group in kinds.items():
            low, high = min(x.sigma_min for x in group), max(x.sigma_max for x in group)
            lines.append(
                f"{kind:<14}{len(group):>4}  {shape[0]:>6}x{shape[1]:<6}  "
                f"{_mean([x.minor_norm_ratio for x in group]):>9.2e}  "
                f"{_mean([x.reconstruction_error_ratio for x in group]):>9.2e}  "
                f"{_mean([x.rounding_loss_ratio for x in group]):>10.2e}  "
                f"{_mean([x.quantization_error_ratio or 0.0 for x in group]):>9.2e}  "
                f"{low:>8.2e} - {high:<8.2e}"
            )
        energies = [x.input_energy_ratio for x in self.layers if x.input_energy_ratio is not None]
        if energies:
            lines.append(
                f"input energy inside the adapter's subspaces: mean {_mean(energies):.1e}, "
                f"largest {max(energies):.1e}"
            )
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines.append(
            f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"({share:.2f} %); {len(self.layers)} layers in {self.seconds:.1f} s, "
            f"peak memory {self.peak_memory_gib:.2f} GiB"
        )
        if self.step0_max_abs_logit_difference is not None:
            lines.append(
                f"step-0 logit difference {self.step0_max_abs_logit_difference:.2e} "
                f"(largest logit {self.step0_max_abs_logit:.2e}, "
                f"relative {self.step0_relative_logit_difference:.1e})"
            )
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def certify_layer(
    name: str,
    weight: Tensor,
    triplets: tuple[Tensor, Tensor, Tensor],
    start: tuple[Tensor, Tensor],
    *,
    stored_dtype: torch.dtype | None,
    subtracted: bool,
    support: Tensor | None = None,
) -> LayerCertificate:
    """Measure what initializing one layer does.

    Args:
        name: Full module name.
        weight: The original weight [d_out, d_in], float32.
        triplets: U [d_out, r], S [r] and Vh [r, d_in] of the slice, float32.
        start: scaling * lora_B0 [d_out, r] and lora_A0 [r, d_in], float32.
        stored_dtype: dtype in which W_p is (or would be) kept; None for quantized weights.
        subtracted: Whether W_p replaces the weight (else the weight stays).
        support: Where U may differ from 0, [d_out, r] of 0 and 1, if each column belongs to some
            of the rows alone.
    """
    U, S, Vh = triplets
    norm, minor_norm = float(weight.norm()), product_norm(*start)
    seen = weight @ Vh.T  # [d_out, r]
    # both sides: an error of U or of V may show in only one of them
    right = float(((seen if support is None else seen * support) - U * S).norm())
    left = float((weight.T @ U - Vh.T * S).norm())
    rounding = error = None
    if stored_dtype is not None:
        # in anchor mode too: it tells what "subtract" would lose in this dtype
        principal = torch.addmm(weight, *start, alpha=-1)
        stored = principal.to(stored_dtype).to(torch.float32)
        rounding = _ratio(float((stored - principal).norm()), norm)
        missing = torch.sub(weight, stored).addmm_(*start, alpha=-1)
        error = _ratio(float(missing.norm()), norm)
    return LayerCertificate(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        r=S.numel(),
        reconstruction_error_ratio=(error or 0.0) if subtracted else 0.0,
        minor_norm_ratio=_ratio(minor_norm, norm),
        minor_energy_ratio=_ratio(minor_norm, norm) ** 2,
        rounding_loss_ratio=(rounding or 0.0) if subtracted else 0.0,
        rounding_loss_if_subtracted_ratio=rounding,
        svd_residual_ratio=_ratio(max(left, right), norm),
        sigma_max=float(S.max()),
        sigma_min=float(S.min()),
        zero_directions=int((S == 0).sum()),
    )


def product_norm(left: Tensor, right: Tensor) -> float:
    """Return ||left right|| of [m, r] and [r, n], without forming the product."""
    left, right = to_float64(left), to_float64(right)
    # ||L R||^2 is the trace of (L^T L)(R R^T), of two r x r matrices
    squared = float(((left.T @ left) * (right @ right.T)).sum())
    return max(squared, 0.0) ** 0.5


def _ratio(part: float, whole: float) -> float:
    """Return part / whole; 0 for the zero matrix, where every part is 0 too."""
    return part / whole if whole > 0 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
