"""First values of the methods that start from no slice of the spectrum: PEFT's own, and LoRA-Null.

PEFT's OLoRA changes the base weights. Here PEFT initializes a copy of one layer at a time, and only
its factors are used: the start is subtracted by the anchor or in W_p, as for MiLoRA.

"null_space" follows LoRA-Null (arXiv:2503.02659): the factors span the directions in which the
inputs of calibration batches have the least energy. Early training steps then change little of
what the model computes on such inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from milora_vl.adapter.certificate import LayerCertificate, certify_layer
from milora_vl.adapter.decompose import lora_factors, naming
from milora_vl.adapter.fingerprint import weight_digests
from milora_vl.adapter.minor_svd import check_weight, row_signs
from milora_vl.adapter.quantized import dense_weight, evaluating, is_quantized, stored_values
from milora_vl.adapter.state import (
    ANCHOR,
    MILORA,
    MiloraState,
    factors,
    lora_layer,
    pretrained_function,
    remember,
)
from milora_vl.runtime import to_float64

MOMENT_BYTES = 4 * 1024**3


def null_space_triplets(
    weight: Tensor, moment: Tensor, r: int
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Decompose the part of a weight that acts on the r input directions of least energy.

    With N [d_in, r] the eigenvectors of the smallest eigenvalues of the inputs' second moment, the
    part is ``W N N^T``; its rank is at most r.

    Args:
        weight: [d_out, d_in], float32.
        moment: [d_in, d_in], float32: sum of x x^T over calibration inputs x.
        r: Number of directions, at most min(d_out, d_in).

    Returns:
        U [d_out, r], S [r] descending and Vh [r, d_in] with ``U diag(S) Vh = W N N^T``; and the
        share of the inputs' energy inside the directions, trace(N^T M N) / trace(M), 0 to 1.
    """
    values, vectors = torch.linalg.eigh(to_float64(moment))  # ascending; squares span a wide range
    quiet = vectors[:, :r].to(weight)  # [d_in, r]
    U, S, right = torch.linalg.svd(weight @ quiet, full_matrices=False)  # [d_out, r], [r], [r, r]
    Vh = right @ quiet.T
    signs = row_signs(Vh)  # equal inputs give equal factors
    total = float(values.sum())
    energy = float(values[:r].clamp(min=0).sum()) / total if total > 0 else 0.0
    return (U * signs, S, Vh * signs[:, None]), energy


def input_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the second moment of every layer's inputs, in the order of ``layers``.

    A moment takes 4 d_in^2 bytes, so the layers are measured in groups of ``MOMENT_BYTES``; each
    group runs the batches once.

    Args:
        model: Runs the batches, in eval mode and without gradients.
        layers: Full name -> linear layer inside ``model``.
        batches: Model inputs on the right device; padded positions do not count.
        progress: Show a progress bar.

    Yields:
        Name and moment [d_in, d_in] in float32, on the device of the layer.

    Raises:
        ValueError: If there are no batches, or inputs are not finite.
    """
    batches = list(batches)
    if not batches:
        raise ValueError(
            "init 'null_space' measures the inputs of every layer: pass calibration batches, "
            "attach_milora(..., calibration=[batch, ...])"
        )
    for group in _groups(layers):
        moments: dict[str, Tensor] = {}
        chosen = {name: layers[name] for name in group}
        bar = tqdm(batches, desc=f"inputs of {len(group)} layers", disable=not progress)
        with evaluating(model), torch.no_grad():
            for batch in bar:
                with _recording(chosen, moments, real_positions(batch)):
                    model(**batch)
        for name in group:
            if name not in moments:
                raise ValueError(f"{name}: no calibration batch reaches it")
            moment = moments.pop(name)
            if not torch.isfinite(moment).all():
                raise ValueError(f"{name}: its inputs on the calibration batches are not finite")
            yield name, moment


@contextmanager
def _recording(
    layers: Mapping[str, nn.Module], moments: dict[str, Tensor], mask: Tensor | None
) -> Iterator[None]:
    def record(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        x = x.reshape(-1, x.shape[-1])  # [tokens, d_in]
        if mask is not None and len(x) == mask.numel():  # layers of experts see only some tokens
            x = x[mask.reshape(-1)]
        x = x.to(torch.float32)
        if name not in moments:
            moments[name] = x.new_zeros(x.shape[1], x.shape[1])
        moments[name].addmm_(x.T, x)

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def real_positions(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which positions of a batch are not padding, bool [B, T]; None without a mask.

    In a mask for every token ([B, 1, T, T], see ``milora_vl.data.encode``) padding sees only
    itself. So does the first token, which is real.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask.bool()
    seen = mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0].bool()
    real = seen.sum(dim=-1) > 1
    real[:, 0] = True
    return real


def _groups(layers: Mapping[str, nn.Module]) -> list[Sequence[str]]:
    groups: list[list[str]] = [[]]
    used = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features**2
        if groups[-1] and used + size > MOMENT_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


PEFT_FACTORS = ("olora", "mica")


def init_baseline(
    peft_model: PeftModel,
    state: MiloraState,
    calibration: Iterable[Mapping[str, Any]] | None,
    progress: bool,
    read: Callable[[str], Tensor] | None = None,
) -> tuple[list[LayerCertificate], dict[str, dict[str, str]], int]:
    """Give every layer its first factors; base weights stay as they are.

    PEFT has already initialized LoRA, rsLoRA and DoRA; they only get their certificate here.

    Args:
        peft_model: With the adapters of ``state``, from ``add_adapters``.
        state: What is attached.
        calibration: Model inputs, for "null_space".
        progress: Show a progress bar.
        read: Full name -> float32 weight [d_out, d_in], in place of what the layers hold.

    Returns:
        Certificates in the order of the layers, digests of the weights per layer, and the highest
        resident memory seen, in bytes.

    Raises:
        ValueError: If a layer cannot be initialized, or calibration batches are missing.
    """
    layers, digests, peak_bytes = [], {}, 0
    process = psutil.Process()
    moments = _moments(peft_model, state, calibration, progress)
    bar = tqdm(moments, total=len(state.modules), desc=state.init, disable=not progress)
    for name, moment in bar:
        base_layer = lora_layer(peft_model, name).get_base_layer()
        # [d_out, d_in] float32
        weight = read(name).float() if read is not None else dense_weight(base_layer)
        with naming(name):
            check_weight(weight, state.rank_of(name))
        energy = None
        if moment is not None:
            (U, S, Vh), energy = null_space_triplets(weight, moment, state.rank_of(name))
            both = lora_factors(U, S, Vh, scaling=state.scaling_of(name))
            write_start_(peft_model, name, state, *both)
        elif state.init in PEFT_FACTORS:
            write_start_(peft_model, name, state, *peft_factors(weight, state, name))
        digests[name] = weight_digests(weight if read is not None else stored_values(base_layer))
        layer = _certify(peft_model, name, state, weight)
        layers.append(replace(layer, input_energy_ratio=energy))
        peak_bytes = max(peak_bytes, process.memory_info().rss)
    return layers, digests, peak_bytes


def peft_factors(weight: Tensor, state: MiloraState, name: str) -> tuple[Tensor, Tensor]:
    """Let PEFT initialize a layer that holds a copy of ``weight``, and return its factors.

    Args:
        weight: [d_out, d_in], float32; not modified.
        state: Names the method, r and lora_alpha.
        name: Full name of the layer.

    Returns:
        lora_A [r, d_in] and lora_B [d_out, r], float32.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight.data.copy_(weight)
    config = LoraConfig(
        r=state.rank_of(name),
        lora_alpha=state.alpha_pattern.get(name, state.lora_alpha),
        target_modules=["layer"],
        init_lora_weights=state.init,
    )
    holder = inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}), adapter_name=MILORA)
    made = holder["layer"]
    return made.lora_A[MILORA].weight.detach(), made.lora_B[MILORA].weight.detach()


def _moments(
    peft_model: PeftModel,
    state: MiloraState,
    calibration: Iterable[Mapping[str, Any]] | None,
    progress: bool,
) -> Iterator[tuple[str, Tensor | None]]:
    if state.init != "null_space":
        yield from ((name, None) for name in state.modules)
        return
    layers = {name: lora_layer(peft_model, name).get_base_layer() for name in state.modules}
    # nothing is subtracted yet and the factors are arbitrary, so measure with the adapters off
    remember(peft_model, replace(state, residual="anchor"))
    with pretrained_function(peft_model):
        yield from input_moments(peft_model, layers, calibration or (), progress=progress)


def write_start_(
    peft_model: PeftModel, name: str, state: MiloraState, lora_A: Tensor, lora_B: Tensor
) -> None:
    """Write the start of one layer: (A0, B0) to the trainable adapter, (A0, -B0) to the anchor."""
    signs = {MILORA: 1.0, ANCHOR: -1.0} if state.has_anchor else {MILORA: 1.0}
    for adapter, sign in signs.items():
        target_A, target_B = factors(peft_model, name, adapter)
        target_A.data.copy_(lora_A)
        target_B.data.copy_(sign * lora_B)


def _certify(
    peft_model: PeftModel, name: str, state: MiloraState, weight: Tensor
) -> LayerCertificate:
    """Measure one layer; the singular values are those of scaling * B A, not of the weight."""
    base_weight = lora_layer(peft_model, name).get_base_layer().weight
    lora_A, lora_B = (factor.detach() for factor in factors(peft_model, name, MILORA))
    no_triplets = (
        torch.zeros_like(lora_B),
        lora_A.new_zeros(lora_A.shape[0]),
        torch.zeros_like(lora_A),
    )
    layer = certify_layer(
        name,
        weight,
        no_triplets,
        (state.scaling_of(name) * lora_B, lora_A),
        stored_dtype=None if is_quantized(base_weight) else base_weight.dtype,
        subtracted=state.residual == "subtract",
    )
    core = torch.linalg.qr(lora_B).R @ torch.linalg.qr(lora_A.T).R.T
    S = state.scaling_of(name) * torch.linalg.svdvals(core)
    dead = (lora_A == 0).all(dim=1) & (lora_B == 0).all(dim=0)
    return replace(
        layer,
        sigma_max=float(S.max()),
        sigma_min=float(S.min()),
        zero_directions=int(dead.sum()),
    )
