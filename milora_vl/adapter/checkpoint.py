"""Save and load adapters: every folder is a plain PEFT LoRA of rank 2r for the original base.

With ``lora_A = [A; A0]``, ``lora_B = [B, -B0]`` and both r and lora_alpha doubled, the stock LoRA
layer computes ``W x + s B A x - s B0 A0 x``, which is what training produced (drawn in attach.py).

Loading checks files, base and shapes first, so a refused adapter leaves the model unchanged. One
base can hold multiple adapters: add, switch, remove. All leave its weights alone (residual
"anchor"), so they do not affect each other, and without them the base is bit for bit the same.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_vl.adapter.experts import layer_of
from milora_vl.adapter.fingerprint import PRECISIONS, fingerprint, is_older
from milora_vl.adapter.nf4 import quantize_residual_
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
    processor_reference,
    read_milora_file,
    read_tensors_,
    write_peft_config,
)
from milora_vl.adapter.quantized import is_quantized
from milora_vl.adapter.state import (
    MILORA,
    MiloraState,
    Residual,
    activate,
    adapter_states,
    add_adapters,
    add_more_adapters_,
    anchor_of,
    base_layer,
    check_not_merged,
    current_adapter,
    forget,
    recall,
    remember,
    restore_anchor_,
    subtract_anchor_,
    trains,
    unload_,
)
from milora_vl.adapter.targets import resolve_residual
from milora_vl.files import replace_folder, sha256_of, write_json_atomic, write_text_atomic
from milora_vl.model.families import find_family
from milora_vl.model.shards import ShardedWeights, checkpoint_folder

logger = logging.getLogger(__name__)


def check_adapter(
    model: nn.Module,
    folder: Path,
    residual: Residual | None,
    *,
    strict_base: bool,
    weights: ShardedWeights | None = None,
    together: bool = False,
) -> MiloraState:
    """Check a saved adapter against a base model, which stays as it is.

    Args:
        model: The original base; its layers may already be wrapped by PEFT.
        folder: Written by ``save_adapter``.
        residual: As for ``load_adapter``.
        strict_base: As for ``load_adapter``.
        weights: As for ``load_adapter``.
        together: As for ``load_adapter``.

    Returns:
        What the model has to remember of the adapter.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, the base is another one, or shapes do not fit.
    """
    metadata = read_milora_file(folder)
    check_files(folder, metadata)
    _check_layers_exist(model, metadata, folder)
    weights = _check_base(model, metadata, folder, strict_base, weights, together)
    if not metadata.state().has_anchor:
        residual = "anchor"  # nothing to subtract: the base weights stay
    elif residual is None:
        # a low-precision base would lose part of the slice to rounding, see the certificate
        possible = resolve_residual(model, metadata.modules, "auto", weights is not None)
        residual = metadata.residual if possible == "subtract" else "anchor"
    state = metadata.state(resolve_residual(model, metadata.modules, residual, weights is not None))
    check_shapes(model, state, folder)
    return state


def check_name(adapter_name: str, taken: Collection[str] = ()) -> None:
    """Refuse a name that PEFT cannot give to an adapter of ours.

    Raises:
        ValueError: If it is taken, empty, or would hide something of the modules that hold it.
    """
    hidden = hasattr(nn.ModuleDict(), adapter_name) or hasattr(nn.ParameterDict(), adapter_name)
    clash = {adapter_name, anchor_of(adapter_name)} & {*taken}
    if clash or hidden or "." in adapter_name or not adapter_name:
        raise ValueError(
            f"{adapter_name!r} cannot name a new adapter: choose a name without a dot that is none "
            f"of {sorted(taken)} and no attribute of a torch module, as 'half' or 'train' are"
        )


def _check_layers_exist(model: nn.Module, metadata: MiloraFile, folder: Path) -> None:
    present = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    # PEFT's wrapper of experts stands between them and their name
    present = {name.replace(".base_layer", "") for name in present}
    missing = [name for name in metadata.modules if name not in present]
    if missing:
        raise ValueError(
            f"{folder}: the model has no layer {missing[0]} ({len(missing)} of "
            f"{len(metadata.modules)} are missing); the adapter was made on {metadata.base}"
        )
    if metadata.projector and find_family(model).projector != metadata.projector:
        raise ValueError(f"{folder}: the model has no projector {metadata.projector}")


def _check_base(
    model: nn.Module,
    metadata: MiloraFile,
    folder: Path,
    strict_base: bool,
    weights: ShardedWeights | None,
    together: bool,
) -> ShardedWeights | None:
    """Compare fingerprints; return the float weights, unless those in memory are the right ones."""
    older = is_older(metadata.fingerprint)
    alone = partial(fingerprint, model, metadata.modules, older=older)
    read = partial(alone, together=together)
    found = read(weights, only_exact=True)["exact"]
    match = [key for key in PRECISIONS if metadata.fingerprint.get(key) == found]
    if match and match[0] != "exact":
        logger.info("%s: same base, its weights rounded to %s", folder, match[0])
    if match:
        return weights
    # trained in another precision: the same rounding gives the same values
    forms = read(weights)
    cast = [key for key in PRECISIONS if forms[key] == metadata.fingerprint["exact"]]
    if not cast and weights is None:
        cast = _cast_of_checkpoint(model, metadata, found, alone)
    if cast == ["exact"]:
        logger.info("%s: same base, its weights rounded from those on disk", folder)
        return weights
    if cast:
        logger.warning(
            "%s: same base, which was rounded to %s in training and is not rounded here; what the "
            "adapter adds is exact, the base differs from that of training by the rounding",
            folder,
            cast[0],
        )
        return weights
    quantized = any(is_quantized(layer_of(model, name).weight) for name in metadata.modules)
    if weights is not None and metadata.fingerprint["exact"] == read(only_exact=True)["exact"]:
        return None  # made on the 4-bit weights as they are
    message = (
        f"{folder} was made on other weights: base {metadata.base['name_or_path']} (revision "
        f"{metadata.base['revision']}) has fingerprint {metadata.fingerprint['exact'][:16]}, this "
        f"model ({getattr(model, 'name_or_path', '') or type(model).__name__}"
        f"{', quantized' if quantized else ''}) has {found[:16]}. Load the original base"
        f"{', or pass weights=vlm.float_weights of load_vlm' if quantized and not weights else ''}"
        f"{_reason_of_dtype(model, metadata)}"
    )
    if strict_base:
        raise ValueError(
            f"{message}; strict_base=False loads it anyway, and then the model does not compute "
            "what it was trained to"
        )
    logger.warning(message)
    return weights


def _cast_of_checkpoint(
    model: nn.Module,
    metadata: MiloraFile,
    found: str,
    read: Callable[[ShardedWeights], dict[str, str]],
) -> list[str]:
    """Return the dtypes of training, if the checkpoint on disk rounds to it and to this model."""
    try:
        name, revision = getattr(model, "name_or_path", "") or "-", metadata.base["revision"]
        folder = checkpoint_folder(name, revision, only_here=True)
        forms = read(ShardedWeights(folder, model))
    except (OSError, ValueError, KeyError, AttributeError):  # no readable checkpoint
        return []
    recorded = metadata.fingerprint["exact"]
    same = [key for key in PRECISIONS if found in forms.values() and forms[key] == recorded]
    return same[:1]  # "exact" first: the weights of training may be those of several dtypes


def _reason_of_dtype(model: nn.Module, metadata: MiloraFile) -> str:
    held = str(layer_of(model, metadata.modules[0]).weight.dtype).removeprefix("torch.")
    if metadata.dtype in (None, held):
        return ""
    return (
        f". It was trained in {metadata.dtype} and this model is in {held}: if it is the same "
        f"checkpoint, load it with dtype {metadata.dtype}, or from a local folder, whose float "
        "weights can be compared"
    )


def add_adapter_from(
    peft_model: PeftModel,
    folder: Path | str,
    adapter_name: str,
    *,
    trainable: bool = False,
    strict_base: bool = True,
    weights: ShardedWeights | None = None,
) -> None:
    """Load a saved adapter beside those a model has, and make it the active one.

    Args:
        peft_model: From ``load_adapter`` or ``attach_milora`` with residual "anchor".
        folder: Written by ``save_adapter``.
        adapter_name: Name of the new adapter on this model.
        trainable: Whether the new adapter trains.
        strict_base: Refuse a base whose weights are not those the adapter was made on.
        weights: Float weights on disk of a base that ``load_vlm`` quantized
            (``vlm.float_weights``), which tell whether it is the right one.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If the name is taken, another adapter changed the base weights, a file is
            damaged, the base is another one, or shapes do not fit. The model is then as before.
    """
    before = current_adapter(peft_model)
    mode, trained = peft_model.training, trains(peft_model, before)
    _check_shared_base(peft_model)
    check_name(adapter_name, set(peft_model.peft_config))
    base = peft_model.get_base_model()
    state = check_adapter(base, Path(folder), "anchor", strict_base=strict_base, weights=weights)
    try:
        add_more_adapters_(peft_model, state, adapter_name)
        read_tensors_(peft_model, state, Path(folder), adapter_name)
    except BaseException:
        _delete(peft_model, adapter_name, before, trainable=trained)
        peft_model.train(mode)
        raise
    remember(peft_model, state, adapter_name)
    use_adapter(peft_model, adapter_name, trainable=trainable)


def use_adapter(peft_model: PeftModel, adapter_name: str, *, trainable: bool = False) -> None:
    """Make one of the adapters active, with its projector, and all others inactive.

    Args:
        peft_model: A model with several adapters.
        adapter_name: Which.
        trainable: Whether it trains; all others are frozen.

    Raises:
        ValueError: If there is no such adapter.
    """
    _check_known(peft_model, adapter_name)
    state = recall(peft_model, adapter_name)
    activate(peft_model, state.residual, trainable=trainable, adapter_name=adapter_name)
    for name in set(peft_model.peft_config) - {adapter_name}:
        peft_model.set_requires_grad(name, requires_grad=False)
    if not trainable:
        peft_model.eval()


def remove_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """Remove one adapter; if it was active, the oldest other one becomes active.

    An active adapter that stays keeps training if it did.

    Raises:
        ValueError: If there is no such adapter, or it is the last one.
    """
    _check_known(peft_model, adapter_name)
    others = [name for name in adapter_states(peft_model) if name != adapter_name]
    if not others:
        raise ValueError(
            f"{adapter_name!r} is the last adapter; unload_adapters(peft_model) returns the base"
        )
    current = current_adapter(peft_model)
    following = others[0] if current == adapter_name else current
    trainable = current != adapter_name and trains(peft_model, current)
    forget(peft_model, adapter_name)
    _delete(peft_model, adapter_name, following, trainable=trainable)


def unload_adapters(peft_model: PeftModel) -> PreTrainedModel:
    """Remove all adapters and return the original base model, its projector included.

    Raises:
        ValueError: If an adapter changed the base weights (residual "subtract").
    """
    _check_shared_base(peft_model)
    return unload_(peft_model, [state.projector for state in adapter_states(peft_model).values()])


def _delete(
    peft_model: PeftModel, adapter_name: str, following: str, *, trainable: bool = False
) -> None:
    """Delete an adapter and its anchor, and make another one active."""
    restore_anchor_(peft_model, anchor_of(adapter_name))
    peft_model.set_adapter(following, inference_mode=True)  # PEFT deletes only if one is active
    for name in (anchor_of(adapter_name), adapter_name):
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
    use_adapter(peft_model, following, trainable=trainable)


def _check_known(peft_model: PeftModel, adapter_name: str) -> None:
    known = list(adapter_states(peft_model))
    if adapter_name not in known:
        raise ValueError(f"there is no adapter {adapter_name!r}; this model has {known}")


def _check_shared_base(peft_model: PeftModel) -> None:
    check_not_merged(peft_model)
    for name, state in adapter_states(peft_model).items():
        if state.residual == "subtract":
            raise ValueError(
                f"adapter {name!r} changed the base weights (residual='subtract'), so they are no "
                "base for others; load it with load_adapter(..., residual='anchor')"
            )


def save_adapter(
    peft_model: PeftModel,
    folder: Path | str,
    *,
    base: str | None = None,
    revision: str | None = None,
    extra: dict[str, Any] | None = None,
    processor: Any | None = None,
    adapter_name: str | None = None,
    inputs: dict[str, Any] | None = None,
) -> Path:
    """Save the adapter in its portable form; the live model is only read.

    The folder appears, or is replaced, whole: after a failure it holds what it held before.
    Besides the adapter it holds the trained projector and ``milora.json``.

    Args:
        peft_model: From ``attach_milora`` or ``load_adapter``, not wrapped or sharded.
        folder: Where to write. An existing folder is replaced only if it is empty or an adapter.
        base: Id or path of the original base model; default: where the model was loaded from.
        revision: Revision of ``base`` on its hub.
        extra: More metadata to keep in ``milora.json``; must be JSON.
        processor: Processor of the base; a reference to it is kept in ``milora.json``.
        adapter_name: Which of several adapters; default: the active one.
        inputs: What answers depend on besides the weights (``tuned.describe_inputs``).

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no MiLoRA adapter, its tensors are sharded, or ``folder`` holds
            something else.
        OSError: If the disk is full or not writable.
    """
    check_writable(Path(folder))
    state = recall(peft_model, adapter_name)
    metadata = describe(peft_model, state, base=base, revision=revision, extra=extra)
    metadata = metadata.model_copy(
        update={"processor": processor_reference(processor), "inputs": inputs}
    )
    class_names = {
        "base_model_class": type(peft_model.get_base_model()).__name__,
        "parent_library": type(peft_model.get_base_model()).__module__,
    }
    return write_adapter(
        Path(folder), portable_tensors(peft_model, adapter_name), metadata, class_names=class_names
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
    weights = [base_layer(peft_model, name).weight for name in state.modules]
    quantized = sorted({type(weight).__name__ for weight in weights if is_quantized(weight)})
    held = peft_model.get_base_model().get_input_embeddings().weight if quantized else weights[0]
    if quantized:
        reference["quantized"] = ", ".join(quantized)
    return MiloraFile(
        format_version=FORMAT_VERSION,
        **{**vars(state), "modules": list(state.modules)},
        base=reference,
        weights_sha256="",
        packages=installed_versions(),
        dtype=str(held.dtype).removeprefix("torch."),
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
    metadata: MiloraFile,
    *,
    class_names: dict[str, str] | None = None,
    texts: dict[str, str] | None = None,
) -> Path:
    """Write an adapter folder whole, or leave what was there.

    Args:
        folder: Target; see ``check_writable``.
        tensors: As ``portable_tensors`` returns them.
        metadata: Content of ``milora.json``; the digest of the weights is filled in here.
        class_names: Class and library of the base model, for PEFT's own file.
        texts: More files beside them: name -> text.

    Raises:
        OSError: If the disk is full or not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        config = portable_config(
            metadata.state(), metadata.base["name_or_path"], metadata.base["revision"]
        )
        write_peft_config(temporary, config, class_names)
        digest = sha256_of(temporary / WEIGHTS_FILE)
        metadata = metadata.model_copy(update={"weights_sha256": digest})
        write_json_atomic(temporary / MILORA_FILE, metadata.model_dump())
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
    together: bool = False,
) -> PeftModel:
    """Put a saved adapter on its original base model, ready to go on training or to be used.

    The rank-2r tensors are split again, so that A, B, A0 and B0 are exactly those that were saved.

    Args:
        model: The original base model, wrapped in place. With residual "subtract" its weights
            become W_p.
        folder: Written by ``save_adapter``.
        trainable: Whether A, B and the projector train.
        residual: "subtract" or "anchor"; default: as recorded, or "anchor" where the weights of
            ``model`` are neither float32 nor quantized from ``weights``.
        strict_base: Refuse a base whose weights are not those the adapter was made on.
        adapter_name: Its name on the model, see ``milora_vl.adapter.checkpoint``.
        weights: Float weights on disk of a ``model`` that ``load_vlm`` quantized
            (``vlm.float_weights``): W_p is formed from them and quantized again.
        together: Every process of the job makes this call: the weights are digested once, each
            process a share of them.

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
    state = check_adapter(
        model, folder, residual, strict_base=strict_base, weights=weights, together=together
    )
    peft_model = add_adapters(model, state, adapter_name)
    read_tensors_(peft_model, state, folder, adapter_name)
    if state.residual == "subtract" and weights is not None:
        quantize_residual_(peft_model, state, weights, adapter_name=adapter_name)
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
