"""Save and load adapters: every folder is a plain PEFT LoRA of rank 2r for the original base.

With ``lora_A = [A; A0]``, ``lora_B = [B, -B0]`` and both r and lora_alpha doubled, the stock LoRA
layer computes ``W x + s B A x - s B0 A0 x``, which is what training produced.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from milora_vl.adapter.fingerprint import PRECISIONS, fingerprint
from milora_vl.adapter.portable import (
    FORMAT_VERSION,
    MILORA_FILE,
    PEFT_CONFIG_FILE,
    WEIGHTS_FILE,
    MiloraFile,
    check_files,
    check_shapes,
    installed_versions,
    portable_config,
    portable_tensors,
    read_milora_file,
    read_tensors_,
)
from milora_vl.adapter.quantize import is_quantised
from milora_vl.adapter.residual_nf4 import quantise_residual_
from milora_vl.adapter.state import (
    MiloraState,
    Residual,
    activate,
    add_adapters,
    recall,
    remember,
    subtract_anchor_,
)
from milora_vl.adapter.targets import find_projector, resolve_residual
from milora_vl.files import replace_folder, sha256_of, write_json_atomic
from milora_vl.model.shards import ShardedWeights

logger = logging.getLogger(__name__)


def save_adapter(
    peft_model: PeftModel,
    folder: Path | str,
    *,
    base: str | None = None,
    revision: str | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save the adapter in its portable form; the live model is only read.

    The folder appears, or is replaced, whole: after a failure it holds what it held before.
    Besides the adapter it holds the trained projector and ``milora.json``.

    Args:
        peft_model: From ``attach_milora`` or ``load_adapter``, not wrapped or sharded.
        folder: Where to write. An existing folder is replaced only if it is empty or an adapter.
        base: Id or path of the original base model; default: where the model was loaded from.
        revision: Revision of ``base`` on its hub.
        extra: More facts to keep in ``milora.json``; must be JSON.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no MiLoRA adapter, its tensors are sharded, or ``folder`` holds
            something else.
        OSError: If the disk is full or not writable.
    """
    folder = Path(folder)
    state = recall(peft_model)
    if folder.exists() and not (folder / PEFT_CONFIG_FILE).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; choose a new folder for the adapter")
    base = _base_name(peft_model, base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(portable_tensors(peft_model), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        portable_config(state, base, revision).save_pretrained(
            str(temporary),
            auto_mapping_dict={
                "base_model_class": type(peft_model.get_base_model()).__name__,
                "parent_library": type(peft_model.get_base_model()).__module__,
            },
        )
        facts = MiloraFile(
            format_version=FORMAT_VERSION,
            **{**vars(state), "modules": list(state.modules)},
            base={"name_or_path": base, "revision": revision},
            weights_sha256=sha256_of(temporary / WEIGHTS_FILE),
            packages=installed_versions(),
            extra=extra or {},
        )
        write_json_atomic(temporary / MILORA_FILE, facts.model_dump())
        temporary.chmod(0o755)  # mkdtemp and safetensors keep others out
        (temporary / WEIGHTS_FILE).chmod(0o644)
        with (temporary / WEIGHTS_FILE).open("rb") as stream:
            os.fsync(stream.fileno())  # the rename must not reach the disk before the data
        replace_folder(temporary, folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: the adapter could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_adapter(
    model: PreTrainedModel,
    folder: Path | str,
    trainable: bool = False,
    *,
    residual: Residual | None = None,
    strict_base: bool = True,
    weights: ShardedWeights | None = None,
) -> PeftModel:
    """Put a saved adapter on its original base model, ready to go on training or to be used.

    The rank-2r tensors are split again, so that A, B, A0 and B0 are exactly those that were saved.

    Args:
        model: The original base model, wrapped in place. With residual "subtract" its weights
            become W_p.
        folder: Written by ``save_adapter``.
        trainable: Whether A, B and the projector train.
        residual: "subtract" or "anchor"; default: as recorded, or "anchor" where the weights of
            ``model`` are neither float32 nor quantised from ``weights``.
        strict_base: Refuse a base whose weights are not those the adapter was made on.
        weights: Float weights on disk of a ``model`` that ``load_vlm`` quantised
            (``vlm.float_weights``): W_p is formed from them and quantised again.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, the base is another one, or shapes do not fit.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel):
        raise ValueError("the model already carries a PEFT adapter; pass the base model")
    facts = read_milora_file(folder)
    check_files(folder, facts)
    _check_layers_exist(model, facts, folder)
    _check_base(model, facts, folder, strict_base, weights)
    if residual is None:
        # a low-precision base would lose part of the slice to rounding, see the certificate
        possible = resolve_residual(model, facts.modules, "auto", weights is not None)
        residual = facts.residual if possible == "subtract" else "anchor"
    residual = resolve_residual(model, facts.modules, residual, weights is not None)
    names = MiloraState.__dataclass_fields__
    values = {key: value for key, value in facts.model_dump().items() if key in names}
    state = MiloraState(**{**values, "modules": tuple(facts.modules), "residual": residual})
    check_shapes(model, state, folder)
    peft_model = add_adapters(model, state)
    read_tensors_(peft_model, state, folder)
    if residual == "subtract":
        if weights is not None:
            quantise_residual_(peft_model, state, weights)
        else:
            subtract_anchor_(peft_model, state.modules)
    remember(peft_model, state)
    activate(peft_model, residual, trainable=trainable)
    if not trainable:
        peft_model.eval()
    return peft_model


def _base_name(peft_model: PeftModel, base: str | None) -> str | None:
    name = base or getattr(peft_model.get_base_model(), "name_or_path", None)
    if name and Path(name).exists():
        return str(Path(name).resolve())  # a relative path means nothing elsewhere
    return name or None


def _check_layers_exist(model: PreTrainedModel, facts: MiloraFile, folder: Path) -> None:
    present = {name for name, _ in model.named_modules()}
    missing = [name for name in facts.modules if name not in present]
    if missing:
        raise ValueError(
            f"{folder}: the model has no layer {missing[0]} ({len(missing)} of "
            f"{len(facts.modules)} are missing); the adapter was made on {facts.base}"
        )
    if facts.projector and find_projector(model) != facts.projector:
        raise ValueError(f"{folder}: the model has no projector {facts.projector}")


def _check_base(
    model: PreTrainedModel,
    facts: MiloraFile,
    folder: Path,
    strict_base: bool,
    weights: ShardedWeights | None,
) -> None:
    found = fingerprint(model, facts.modules, weights)["exact"]
    match = [precision for precision in PRECISIONS if facts.fingerprint[precision] == found]
    if match and match[0] != "exact":
        logger.info("%s: same base, its weights rounded to %s", folder, match[0])
    if match:
        return
    quantised = any(is_quantised(model.get_submodule(name).weight) for name in facts.modules)
    message = (
        f"{folder} was made on other weights: base {facts.base['name_or_path']} (revision "
        f"{facts.base['revision']}) has fingerprint {facts.fingerprint['exact'][:16]}, this model "
        f"({getattr(model, 'name_or_path', '') or type(model).__name__}"
        f"{', quantised' if quantised else ''}) has {found[:16]}. Load the original base"
        f"{', or pass weights=vlm.float_weights of load_vlm' if quantised and not weights else ''}"
    )
    if strict_base:
        raise ValueError(
            f"{message}; strict_base=False loads it all the same, and then the model computes "
            "something else than it was trained to"
        )
    logger.warning(message)
