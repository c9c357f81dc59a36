"""The portable adapter folder: the content of its files, and the checks before they are used."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from milora_vl.adapter.experts import layer_of, tensor_key
from milora_vl.adapter.state import (
    MILORA,
    MiloraState,
    Residual,
    anchor_of,
    current_adapter,
    factors,
    load_trained_state_,
    magnitude,
    recall,
    trained_projector,
    trained_state,
)
from milora_vl.files import sha256_of, write_text_atomic

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
MILORA_FILE = "milora.json"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
FORMAT_VERSION = 4  # 4: fingerprints of the bytes as stored, see ``fingerprint.py``
CONFIG_KEYS = (
    "r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora", "bias",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_parameters",
)  # fmt: skip
ALWAYS_WRITTEN = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "target_modules", "modules_to_save", "lora_dropout", "bias",
)  # fmt: skip
"""Keys of ``adapter_config.json`` that readers look for even at PEFT's defaults; all of 0.10."""
PACKAGES = ("milora-vl", "peft", "transformers", "torch", "safetensors")


class MiloraFile(BaseModel):
    """The content of ``milora.json``.

    Attributes:
        format_version: Of this file; a newer one than known is refused.
        init: Method that gave the first values.
        base: Id or path and revision of the base model.
        processor: Where its processor is, its classes and a digest of its tokenizer, or None.
        fingerprint: Of the original weights of the adapted layers, per precision that is known.
        weights_sha256: Of the weights file beside it.
        dtype: Of the base in training, for example "bfloat16"; None in files of format 2.
        inputs: What answers depend on beside the weights, see ``tuned.describe_inputs``.
        packages: Package -> version at saving.
        extra: Added by the caller.
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
    init: str = "milora"
    base: dict[str, str | None]
    processor: dict[str, str | None] | None = None
    fingerprint: dict[Literal["exact", "bfloat16", "float16"], str]
    quantization_correction: str = "none"
    scale: str = "singular"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    blocks: dict[str, tuple[int, ...]] = {}
    experts: dict[str, tuple[int, bool, int]] = {}
    weights_sha256: str
    packages: dict[str, str]
    dtype: str | None = None
    inputs: dict[str, Any] | None = None
    extra: dict[str, Any] = {}

    @field_validator("fingerprint")
    @classmethod
    def _has_exact(cls, value: dict[str, str]) -> dict[str, str]:
        if "exact" not in value:
            raise ValueError("the digest of the weights as they were is missing")
        return value

    @field_validator("base", mode="before")
    @classmethod
    def _read_older_spelling(cls, base: Any) -> Any:
        if isinstance(base, dict) and "quantised" in base:
            return {key.replace("quantised", "quantized"): value for key, value in base.items()}
        return base

    def state(self, residual: Residual | None = None) -> MiloraState:
        """Return the part that a model remembers, with another residual mode if one is given."""
        names = MiloraState.__dataclass_fields__
        values = {key: value for key, value in self.model_dump().items() if key in names}
        values |= {"modules": tuple(self.modules), "residual": residual or self.residual}
        return MiloraState(**values)


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


def portable_tensors(peft_model: PeftModel, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of the plain LoRA, under PEFT's names, as CPU copies.

    ``lora_A`` [2r, d_in] and ``lora_B`` [d_out, 2r] per layer, float32 (r instead of 2r without
    an anchor, and DoRA's magnitude [d_out] beside them); the trained projector in float32 where it
    has master weights.

    Raises:
        ValueError: If a tensor is sharded over processes.
    """
    adapter_name = adapter_name or current_adapter(peft_model)
    state = recall(peft_model, adapter_name)
    parts = [adapter_name, anchor_of(adapter_name)] if state.has_anchor else [adapter_name]
    tensors: dict[str, Tensor] = {}
    check_whole(peft_model)
    for name in state.modules:
        pairs = [[_whole(f, name) for f in factors(peft_model, name, part)] for part in parts]
        stack, key = state.stack_of(name), tensor_key(name, state.stack_of(name))
        if stack:
            both = stack.join(pairs)
        else:
            both = torch.cat([A for A, _ in pairs], dim=0), torch.cat([B for _, B in pairs], dim=1)
        tensors[f"{PREFIX}{key}.lora_A.weight"], tensors[f"{PREFIX}{key}.lora_B.weight"] = both
        if state.init == "dora":
            value = magnitude(peft_model, name, adapter_name).detach().to("cpu", torch.float32)
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = value.clone()
    if state.projector:
        trained = trained_projector(peft_model, state.projector, adapter_name)
        for key, value in trained_state(trained).items():
            # clone: on the CPU `.cpu()` is the live tensor, which training changes during the write
            tensors[f"{PREFIX}{state.projector}.{key}"] = value.detach().cpu().clone()
    for key, value in tensors.items():
        check_finite(key, value)
    return tensors


def check_finite(key: str, value: Tensor) -> None:
    """Refuse a tensor with NaN or infinite values.

    Raises:
        ValueError: Naming it, with the number of such values.
    """
    bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
    if bad:
        raise ValueError(
            f"{key}: {bad} of {value.numel()} values are NaN or infinite, so the training "
            "diverged; go back to an earlier checkpoint"
        )


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are sharded, before anything is trained or written.

    Raises:
        ValueError: Naming the parameter and how it is sharded.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            how = "FSDP2 (DTensor)"
        elif hasattr(parameter, "ds_id"):
            how = "DeepSpeed ZeRO-3"
        elif type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_is_flat_param"):
            how = "FSDP (flat parameters)"
        else:
            continue
        raise ValueError(
            f"{name} is sharded over processes by {how}, and adapters are saved from whole "
            "parameters only. Train with DistributedDataParallel (no fsdp settings) or DeepSpeed "
            "ZeRO-2; at 7B that fits one 80 GB device, in 4 bits (quantization='nf4') a 24 GB one"
        )


def _whole(factor: Tensor, name: str) -> Tensor:
    if factor.ndim != 2 or factor.numel() == 0:
        raise ValueError(
            f"{name}: the factor has shape {tuple(factor.shape)}, so it is sharded over processes; "
            "gather the parameters before saving (FSDP summon_full_params, ZeRO GatheredParameters)"
        )
    return factor.detach().to("cpu", torch.float32)


def portable_config(state: MiloraState, base: str | None, revision: str | None) -> LoraConfig:
    """Return the PEFT configuration of the plain LoRA for the original base.

    rsLoRA is written as plain scaling: alpha / r with alpha = lora_alpha * sqrt(r) is the same
    factor, and readers that do not know ``use_rslora`` (SGLang, llama.cpp) do not get it wrong.
    """
    return LoraConfig(
        **state.peft_ranks(state.widening, plain=True),
        use_dora=state.init == "dora",
        **state.peft_targets(),
        modules_to_save=[state.projector] if state.projector else None,
        lora_dropout=state.lora_dropout,
        bias="none",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )


def write_peft_config(
    folder: Path, config: LoraConfig, class_names: dict[str, str] | None = None
) -> None:
    """Write ``adapter_config.json`` with the keys that say something.

    PEFT refuses keys that it does not know, and each version adds some. Keys at their defaults are
    therefore left out, so that older versions read what newer ones write.

    Args:
        folder: Where the file goes.
        config: Of the adapter.
        class_names: Class and library of the base model, for ``AutoPeftModel``.
    """
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in values.items()
        if key in ALWAYS_WRITTEN or value != defaults[key]
    }
    if class_names:
        kept["auto_mapping"] = class_names
    write_text_atomic(folder / PEFT_CONFIG_FILE, json.dumps(kept, indent=2, sort_keys=True))


def installed_versions() -> dict[str, str]:
    """Return package -> version of what the adapter was made with."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor_reference(processor: Any | None) -> dict[str, str | None] | None:
    """Return what ``milora.json`` keeps of a processor, so that another one can be noticed."""
    if processor is None:
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    image_processor = getattr(processor, "image_processor", None)
    vocabulary = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)]
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    return {
        "name_or_path": tokenizer.name_or_path or None,
        "class": type(processor).__name__,
        "image_processor": type(image_processor).__name__ if image_processor else None,
        "tokenizer": type(tokenizer).__name__,
        "tokenizer_sha256": _digest(vocabulary),
        "chat_template_sha256": _digest(template),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, metadata: MiloraFile) -> None:
    """Check that the files beside ``milora.json`` are those it was written with.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If the weights changed or the PEFT configuration contradicts ``milora.json``.
    """
    config_path = folder / PEFT_CONFIG_FILE
    if not config_path.exists():
        raise FileNotFoundError(f"{config_path} is missing; copy the adapter folder again")
    try:
        actual = LoraConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:  # of JSON and of text too
        raise ValueError(
            f"{config_path} is damaged: {error}; copy the adapter folder again"
        ) from error
    expected = portable_config(metadata.state(), None, None)
    if actual.use_rslora and metadata.init == "rslora":  # as it was written before
        expected.use_rslora, expected.lora_alpha = True, metadata.lora_alpha
    for key in CONFIG_KEYS:
        if _comparable(getattr(actual, key)) != _comparable(getattr(expected, key)):
            raise ValueError(
                f"{config_path}: {key}={getattr(actual, key)}, but {MILORA_FILE} asks for "
                f"{getattr(expected, key)}; one of them was edited, copy the adapter folder again"
            )
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; copy the adapter folder again")
    actual = sha256_of(path)
    if actual != metadata.weights_sha256:
        raise ValueError(
            f"{path} is damaged or was changed: SHA-256 {actual}, expected "
            f"{metadata.weights_sha256} ({path.stat().st_size} bytes on disk); copy the adapter "
            "folder again"
        )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set) else value or None


def check_shapes(model: nn.Module, state: MiloraState, folder: Path) -> None:
    """Check that the stored tensors fit the base model, before it is changed.

    Raises:
        ValueError: Naming the first tensor that is missing, superfluous, of another shape or not
            finite.
    """
    expected: dict[str, list[int]] = {}
    for name in state.modules:
        layer, rank = layer_of(model, name), state.widening * state.rank_of(name)
        stack, key = state.stack_of(name), tensor_key(name, state.stack_of(name))
        rank *= stack.count if stack else 1
        expected[f"{PREFIX}{key}.lora_A.weight"] = [rank, layer.in_features]
        expected[f"{PREFIX}{key}.lora_B.weight"] = [layer.out_features, rank]
        if state.init == "dora":
            expected[f"{PREFIX}{name}.{MAGNITUDE}"] = [layer.out_features]
    if state.projector:
        projector = model.get_submodule(state.projector)
        projector = getattr(projector, "original_module", projector)  # PEFT's wrapper has both
        for key, value in projector.state_dict().items():
            expected[f"{PREFIX}{state.projector}.{key}"] = list(value.shape)
    with _open(folder) as file:
        actual = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        # sorted, so that the message names the same tensor every time
        for key in sorted(expected.keys() | actual.keys()):
            if actual.get(key) != expected.get(key):
                raise ValueError(
                    f"{folder / WEIGHTS_FILE}: {key} has shape {actual.get(key)}, but r={state.r} "
                    f"on this model needs {expected.get(key)}"
                )
            check_finite(f"{folder / WEIGHTS_FILE}: {key}", file.get_tensor(key))


def read_tensors_(
    peft_model: PeftModel, state: MiloraState, folder: Path, adapter_name: str = MILORA
) -> None:
    """Fill the adapters of one name and its projector from the stored tensors."""
    parts = [adapter_name]
    if state.has_anchor:
        parts.append(anchor_of(adapter_name))
    with _open(folder) as file:
        for name in state.modules:
            r, stack = state.rank_of(name), state.stack_of(name)
            key = tensor_key(name, stack)
            both_A = file.get_tensor(f"{PREFIX}{key}.lora_A.weight")  # [2r, d_in]
            both_B = file.get_tensor(f"{PREFIX}{key}.lora_B.weight")  # [d_out, 2r]
            for index, part in enumerate(parts):
                lora_A, lora_B = factors(peft_model, name, part)
                own = slice(index * r, (index + 1) * r)
                A, B = both_A[own], both_B[:, own]
                if stack:
                    A, B = stack.part(both_A, both_B, index, r)
                lora_A.data.copy_(A)
                lora_B.data.copy_(B)
            if state.init == "dora":
                stored = file.get_tensor(f"{PREFIX}{name}.{MAGNITUDE}")  # [d_out]
                magnitude(peft_model, name, adapter_name).data.copy_(stored)
        if state.projector:
            start = f"{PREFIX}{state.projector}."
            keys = [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
            values = {key.removeprefix(start): file.get_tensor(key) for key in keys}
            trained = trained_projector(peft_model, state.projector, adapter_name)
            load_trained_state_(trained, values)


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[Any]:
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is damaged: {error}; copy the adapter folder again"
        ) from error
