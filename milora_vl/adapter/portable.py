"""The portable adapter folder: what its files hold, and the checks before they are believed."""

import contextlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from milora_vl.adapter.master import load_trained_state_, trained_state
from milora_vl.adapter.state import (
    ANCHOR,
    MILORA,
    MiloraState,
    Residual,
    factors,
    recall,
    trained_projector,
)
from milora_vl.files import sha256_of

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
MILORA_FILE = "milora.json"
PREFIX = "base_model.model."
FORMAT_VERSION = 1
PACKAGES = ("milora-vl", "peft", "transformers", "torch", "safetensors")


class MiloraFile(BaseModel):
    """The content of ``milora.json``.

    Attributes:
        format_version: Of this file; a newer one than known is refused.
        base: Id or path and revision of the base model.
        fingerprint: Of the original weights of the adapted layers, per precision.
        weights_sha256: Of the weights file beside it.
        packages: Package -> version at saving.
        extra: What the caller added.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int
    r: int
    lora_alpha: float
    slice: str
    svd: str
    residual: Residual
    lora_dropout: float
    modules: list[str]
    projector: str | None
    base: dict[str, str | None]
    fingerprint: dict[str, str]
    quantization_correction: str = "none"
    weights_sha256: str
    packages: dict[str, str]
    extra: dict[str, Any] = {}


def read_milora_file(folder: Path | str) -> MiloraFile:
    """Read and check ``milora.json``.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged or of a newer format.
    """
    path = Path(folder) / MILORA_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: {folder} is no adapter folder of save_adapter. A plain PEFT "
            "adapter loads with peft.PeftModel.from_pretrained"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = value.get("format_version") if isinstance(value, dict) else None
        if isinstance(found, int) and found > FORMAT_VERSION:
            raise ValueError(f"{path}: format {found} is newer than this package; update it")
        return MiloraFile.model_validate(value)
    except (json.JSONDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy the adapter folder again") from error


def portable_tensors(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors of the plain rank-2r LoRA, under PEFT's names, as CPU copies.

    ``lora_A`` [2r, d_in] and ``lora_B`` [d_out, 2r] per layer, float32; the trained projector in
    float32 where it has master weights.

    Raises:
        ValueError: If a tensor is sharded over processes.
    """
    state = recall(peft_model)
    tensors: dict[str, Tensor] = {}
    for name in state.modules:
        A, B = (_whole(factor, name) for factor in factors(peft_model, name, MILORA))
        A0, minus_B0 = (_whole(factor, name) for factor in factors(peft_model, name, ANCHOR))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([A, A0], dim=0)  # [2r, d_in]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([B, minus_B0], dim=1)  # [d_out, 2r]
    if state.projector:
        trained = trained_projector(peft_model, state.projector)
        for key, value in trained_state(trained).items():
            # clone: on the CPU `.cpu()` is the live tensor, which training changes during the write
            tensors[f"{PREFIX}{state.projector}.{key}"] = value.detach().cpu().clone()
    return tensors


def _whole(factor: Tensor, name: str) -> Tensor:
    if factor.ndim != 2 or factor.numel() == 0:
        raise ValueError(
            f"{name}: the factor has shape {tuple(factor.shape)}, so it is sharded over processes; "
            "gather the parameters before saving (FSDP summon_full_params, ZeRO GatheredParameters)"
        )
    return factor.detach().to("cpu", torch.float32)


def portable_config(state: MiloraState, base: str | None, revision: str | None) -> LoraConfig:
    """Return the PEFT configuration of the plain rank-2r LoRA."""
    return LoraConfig(
        r=2 * state.r,
        lora_alpha=2 * state.lora_alpha,
        target_modules=list(state.modules),
        modules_to_save=[state.projector] if state.projector else None,
        lora_dropout=state.lora_dropout,
        bias="none",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )


def installed_versions() -> dict[str, str]:
    """Return package -> version of what the adapter was made with."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_files(folder: Path, facts: MiloraFile) -> None:
    """Check that the files beside ``milora.json`` are those it was written with.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If the weights changed or the PEFT configuration contradicts ``milora.json``.
    """
    config_path = folder / PEFT_CONFIG_FILE
    if not config_path.exists():
        raise FileNotFoundError(f"{config_path} is missing; copy the adapter folder again")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key, wanted in (("r", 2 * facts.r), ("lora_alpha", 2 * facts.lora_alpha)):
        if config.get(key) != wanted:
            raise ValueError(
                f"{config_path}: {key}={config.get(key)}, but {MILORA_FILE} asks for {wanted}; one "
                "of them was edited, copy the adapter folder again"
            )
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; copy the adapter folder again")
    found = sha256_of(path)
    if found != facts.weights_sha256:
        raise ValueError(
            f"{path} is damaged or was changed: SHA-256 {found}, expected {facts.weights_sha256} "
            f"({path.stat().st_size} bytes on disk); copy the adapter folder again"
        )


def check_shapes(model: nn.Module, state: MiloraState, folder: Path) -> None:
    """Check that the stored tensors fit the base model, before it is changed.

    Raises:
        ValueError: Naming the first tensor that is missing, superfluous or of another shape.
    """
    wanted: dict[str, list[int]] = {}
    for name in state.modules:
        layer = model.get_submodule(name)
        wanted[f"{PREFIX}{name}.lora_A.weight"] = [2 * state.r, layer.in_features]
        wanted[f"{PREFIX}{name}.lora_B.weight"] = [layer.out_features, 2 * state.r]
    if state.projector:
        for key, value in model.get_submodule(state.projector).state_dict().items():
            wanted[f"{PREFIX}{state.projector}.{key}"] = list(value.shape)
    with _open(folder) as file:
        found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for key in sorted(wanted.keys() | found.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {key} has shape {found.get(key)}, but r={state.r} on "
                f"this model needs {wanted.get(key)}"
            )


def read_tensors_(peft_model: PeftModel, state: MiloraState, folder: Path) -> None:
    """Fill both adapters and the projector from the stored tensors."""
    r = state.r
    with _open(folder) as file:
        for name in state.modules:
            both_A = file.get_tensor(f"{PREFIX}{name}.lora_A.weight")  # [2r, d_in]
            both_B = file.get_tensor(f"{PREFIX}{name}.lora_B.weight")  # [d_out, 2r]
            for adapter, part in ((MILORA, slice(0, r)), (ANCHOR, slice(r, 2 * r))):
                lora_A, lora_B = factors(peft_model, name, adapter)
                lora_A.data.copy_(both_A[part])
                lora_B.data.copy_(both_B[:, part])
        if state.projector:
            start = f"{PREFIX}{state.projector}."
            keys = [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
            values = {key.removeprefix(start): file.get_tensor(key) for key in keys}
            load_trained_state_(trained_projector(peft_model, state.projector), values)


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[Any]:
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is damaged: {error}; copy the adapter folder again"
        ) from error
