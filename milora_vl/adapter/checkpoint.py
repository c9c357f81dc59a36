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
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.adapter.base_check import check_adapter, check_name
from milora_vl.adapter.portable import (
    FORMAT_VERSION,
    MILORA_FILE,
    PEFT_CONFIG_FILE,
    WEIGHTS_FILE,
    MiloraFile,
    installed_versions,
    portable_config,
    portable_tensors,
    processor_reference,
    read_tensors_,
)
from milora_vl.adapter.quantize import is_quantised
from milora_vl.adapter.residual_nf4 import quantise_residual_
from milora_vl.adapter.state import (
    MILORA,
    MiloraState,
    Residual,
    activate,
    add_adapters,
    lora_layer,
    recall,
    remember,
    subtract_anchor_,
)
from milora_vl.files import replace_folder, sha256_of, write_json_atomic, write_text_atomic
from milora_vl.model.shards import ShardedWeights

logger = logging.getLogger(__name__)


def save_adapter(
    peft_model: PeftModel,
    folder: Path | str,
    *,
    base: str | None = None,
    revision: str | None = None,
    extra: dict[str, Any] | None = None,
    processor: Any | None = None,
    adapter_name: str | None = None,
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
        processor: Processor of the base; a reference to it is kept in ``milora.json``.
        adapter_name: Which of several adapters; default: the active one.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no MiLoRA adapter, its tensors are sharded, or ``folder`` holds
            something else.
        OSError: If the disk is full or not writable.
    """
    check_writable(Path(folder))
    state = recall(peft_model, adapter_name)
    facts = describe(peft_model, state, base=base, revision=revision, extra=extra)
    facts = facts.model_copy(update={"processor": processor_reference(processor)})
    class_names = {
        "base_model_class": type(peft_model.get_base_model()).__name__,
        "parent_library": type(peft_model.get_base_model()).__module__,
    }
    return write_adapter(
        Path(folder), portable_tensors(peft_model, adapter_name), facts, class_names=class_names
    )


def describe(
    peft_model: PeftModel,
    state: MiloraState,
    *,
    base: str | None,
    revision: str | None,
    extra: dict[str, Any] | None,
) -> MiloraFile:
    """Return the content of ``milora.json``; the digest of the weights is still empty."""
    reference = {"name_or_path": _base_name(peft_model, base), "revision": revision}
    weights = [lora_layer(peft_model, name).get_base_layer().weight for name in state.modules]
    quantised = sorted({type(weight).__name__ for weight in weights if is_quantised(weight)})
    if quantised:
        reference["quantised"] = ", ".join(quantised)
    return MiloraFile(
        format_version=FORMAT_VERSION,
        **{**vars(state), "modules": list(state.modules)},
        base=reference,
        weights_sha256="",
        packages=installed_versions(),
        extra=extra or {},
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that holds something other than an adapter.

    Raises:
        ValueError: Naming the folder.
    """
    if folder.exists() and not (folder / PEFT_CONFIG_FILE).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; choose a new folder for the adapter")


def write_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    facts: MiloraFile,
    *,
    class_names: dict[str, str] | None = None,
    texts: dict[str, str] | None = None,
) -> Path:
    """Write an adapter folder whole, or leave what was there.

    Args:
        folder: Where it goes; see ``check_writable``.
        tensors: As ``portable_tensors`` returns them.
        facts: Content of ``milora.json``; the digest of the weights is filled in here.
        class_names: Class and library of the base model, for PEFT's own file.
        texts: More files beside them: name -> text.

    Raises:
        OSError: If the disk is full or not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        config = portable_config(facts.state(), facts.base["name_or_path"], facts.base["revision"])
        config.save_pretrained(str(temporary), auto_mapping_dict=class_names)
        digest = sha256_of(temporary / WEIGHTS_FILE)
        facts = facts.model_copy(update={"weights_sha256": digest})
        write_json_atomic(temporary / MILORA_FILE, facts.model_dump())
        for name, text in (texts or {}).items():
            write_text_atomic(temporary / name, text)
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
    adapter_name: str = MILORA,
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
        adapter_name: Its name on the model, see ``milora_vl.adapter.several``.
        weights: Float weights on disk of a ``model`` that ``load_vlm`` quantised
            (``vlm.float_weights``): W_p is formed from them and quantised again.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, the base is another one, or shapes do not fit.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model already carries a PEFT adapter; pass the base model, or put this adapter "
            "beside the other with add_adapter_from"
        )
    check_name(adapter_name)
    state = check_adapter(model, folder, residual, strict_base=strict_base, weights=weights)
    peft_model = add_adapters(model, state, adapter_name)
    read_tensors_(peft_model, state, folder, adapter_name)
    if state.residual == "subtract" and weights is not None:
        quantise_residual_(peft_model, state, weights, adapter_name=adapter_name)
    elif state.residual == "subtract":
        subtract_anchor_(peft_model, state.modules, adapter_name)
    remember(peft_model, state, adapter_name)
    activate(peft_model, state.residual, trainable=trainable, adapter_name=adapter_name)
    if not trainable:
        peft_model.eval()
    return peft_model


def _base_name(peft_model: PeftModel, base: str | None) -> str | None:
    name = base or getattr(peft_model.get_base_model(), "name_or_path", None)
    if name and Path(name).exists():
        return str(Path(name).resolve())  # a relative path means nothing elsewhere
    return name or None
