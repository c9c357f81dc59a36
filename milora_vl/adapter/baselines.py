"""First values of the methods that take no slice of the spectrum, PEFT's own wherever it has them.

PEFT's OLoRA writes into the base weights. Here PEFT initialises a copy of one layer at a time and
only the factors are taken from it, so that the base stays as it is and the anchor or W_p does the
rest, as for MiLoRA.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from milora_vl.adapter.certificate import LayerCertificate, certify_layer
from milora_vl.adapter.fingerprint import weight_digests
from milora_vl.adapter.layer import naming
from milora_vl.adapter.minor_svd import check_weight
from milora_vl.adapter.null_space import input_moments, null_space_triplets
from milora_vl.adapter.quantize import dense_weight, is_quantised, stored_values
from milora_vl.adapter.state import (
    ANCHOR,
    MILORA,
    MiloraState,
    factors,
    lora_layer,
    pretrained_function,
    remember,
)

PEFT_FACTORS = ("olora", "mica")


def init_baseline(
    peft_model: PeftModel,
    state: MiloraState,
    calibration: Iterable[Mapping[str, Any]] | None,
    progress: bool,
    read: Callable[[str], Tensor] | None = None,
) -> tuple[list[LayerCertificate], dict[str, dict[str, str]], int]:
    """Give every layer its first factors; base weights stay as they are.

    LoRA, rsLoRA and DoRA were initialised by PEFT when it made the adapter; of them only the
    certificate is written here.

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
        ValueError: If a layer cannot be initialised, or calibration batches are missing.
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
            check_weight(weight, state.r)
        energy = None
        if moment is not None:
            (U, S, Vh), energy = null_space_triplets(weight, moment, state.r)
            root = (S / state.scaling).sqrt()
            _write(peft_model, name, state, root[:, None] * Vh, U * root)
        elif state.init in PEFT_FACTORS:
            _write(peft_model, name, state, *peft_factors(weight, state))
        digests[name] = weight_digests(weight if read is not None else stored_values(base_layer))
        layer = _certify(peft_model, name, state, weight)
        layers.append(replace(layer, input_energy_ratio=energy))
        peak_bytes = max(peak_bytes, process.memory_info().rss)
    return layers, digests, peak_bytes


def peft_factors(weight: Tensor, state: MiloraState) -> tuple[Tensor, Tensor]:
    """Let PEFT initialise a layer that holds a copy of ``weight``, and return its factors.

    Args:
        weight: [d_out, d_in], float32; not modified.
        state: Names the method, r and lora_alpha.

    Returns:
        lora_A [r, d_in] and lora_B [d_out, r], float32.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight.data.copy_(weight)
    config = LoraConfig(
        r=state.r,
        lora_alpha=state.lora_alpha,
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
    # nothing is subtracted yet and the factors are arbitrary: measure with the adapters off
    remember(peft_model, replace(state, residual="anchor"))
    with pretrained_function(peft_model):
        yield from input_moments(peft_model, layers, calibration or (), progress=progress)


def _write(
    peft_model: PeftModel, name: str, state: MiloraState, lora_A: Tensor, lora_B: Tensor
) -> None:
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
    no_triplets = torch.zeros_like(lora_B), lora_A.new_zeros(state.r), torch.zeros_like(lora_A)
    layer = certify_layer(
        name,
        weight,
        no_triplets,
        (state.scaling * lora_B, lora_A),
        stored_dtype=None if is_quantised(base_weight) else base_weight.dtype,
        subtracted=state.residual == "subtract",
    )
    core = torch.linalg.qr(lora_B).R @ torch.linalg.qr(lora_A.T).R.T
    S = state.scaling * torch.linalg.svdvals(core)
    dead = (lora_A == 0).all(dim=1) & (lora_B == 0).all(dim=0)
    return replace(
        layer,
        sigma_max=float(S.max()),
        sigma_min=float(S.min()),
        zero_directions=int(dead.sum()),
    )
