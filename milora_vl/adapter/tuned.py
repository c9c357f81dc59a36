"""A base model with a saved adapter of any kind: loaded as it was trained, every tensor in place.

All verbs that use an adapter come through here, so that all take the same ones: folders of
``save_adapter``, runs and checkpoints that hold one, plain PEFT adapters, and hub ids of either.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.adapter.portable import (
    MILORA_FILE,
    PEFT_CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    check_finite,
    read_milora_file,
)
from milora_vl.adapter.state import (
    Residual,
    recall,
    remove_master_weights_,
    trained_projector,
)
from milora_vl.model.families import find_family
from milora_vl.model.load import VLM, load_vlm
from milora_vl.model.load_errors import explain

logger = logging.getLogger(__name__)

LORA_PARTS = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.weight|\.bias)?$"
)
OLD_NAMES = (  # transformers 4.4x -> 5
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(multi_modal_projector|vision_tower|image_newline)\b", r"model.\1"),
)


@dataclass(frozen=True)
class Found:
    """An adapter and what it says of itself.

    Attributes:
        folder: Holds ``adapter_config.json``, and ``milora.json`` if this package wrote it.
        is_ours: Whether this package wrote it.
        base: Id or path of the base that it names, or None.
        revision: Of the base.
        dtype: In which the base was trained, or None where that is not recorded.
        inputs: What its answers depend on beside the weights, see ``describe_inputs``.
        is_nf4: Whether the base was in 4 bits.
    """

    folder: Path
    is_ours: bool
    base: str | None
    revision: str | None
    dtype: torch.dtype | None
    inputs: Mapping[str, Any]
    is_nf4: bool = False


def is_adapter(path: Path | str | None) -> bool:
    """Tell whether a folder is an adapter, or a run or checkpoint with one, and no model."""
    if path is None or (Path(path) / "config.json").exists():
        return False
    return any(
        (folder / name).exists()
        for folder in (Path(path), Path(path) / "adapter")
        for name in (MILORA_FILE, PEFT_CONFIG_FILE)
    )


def find_adapter(path: Path | str) -> Path:
    """Return the adapter folder of a run, a checkpoint, an adapter folder or a hub id.

    Raises:
        FileNotFoundError: If there is none.
    """
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / MILORA_FILE).exists() or (folder / PEFT_CONFIG_FILE).exists():
            return folder
    if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        try:
            fetched = Path(snapshot_download(str(path), allow_patterns=["*.json", WEIGHTS_FILE]))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(str(explain(str(path), error))) from error
        if (fetched / PEFT_CONFIG_FILE).exists():
            return fetched
    raise FileNotFoundError(
        f"{path}: neither an adapter folder (with {MILORA_FILE} or {PEFT_CONFIG_FILE}) nor a run "
        "or checkpoint with one in adapter/, nor an adapter's hub id"
    )


def read_adapter(path: Path | str) -> Found:
    """Read what an adapter says of itself.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If its description is damaged.
    """
    folder = find_adapter(path)
    if (folder / MILORA_FILE).exists():
        metadata = read_milora_file(folder)
        return Found(
            folder=folder,
            is_ours=True,
            base=metadata.base["name_or_path"],
            revision=metadata.base["revision"],
            dtype=getattr(torch, metadata.dtype) if metadata.dtype else None,
            inputs=metadata.inputs or {},
            is_nf4=metadata.base.get("quantized") == "Params4bit",
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / PEFT_CONFIG_FILE} cannot be read: {error}") from error
    return Found(folder, False, config.base_model_name_or_path, config.revision, None, {})


def choose_model(
    model: Path | str | None, adapter: Path | str | None
) -> tuple[str, Path | str | None]:
    """Return the base and the adapter to load, each given, or found in the other.

    Args:
        model: Hub id or folder of the base; a folder that holds an adapter stands for that adapter
            on the base it names.
        adapter: See ``find_adapter``; None for the base alone.

    Raises:
        ValueError: If the base is not known, or two adapters are given.
        FileNotFoundError: If there is no adapter.
    """
    if is_adapter(model):
        if adapter is not None:
            raise ValueError(
                f"--model {model} is an adapter, and --adapter {adapter} another one; give the base"
            )
        model, adapter = None, model
    base = model or (read_adapter(adapter).base if adapter else None)
    if not base:
        raise ValueError("which model? pass --model, or an --adapter that names its base")
    return str(base), adapter


def load_tuned(
    model: Path | str | None,
    adapter: Path | str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "auto",
    quantization: Literal["nf4"] | None = None,
    prompt_style: str | None = None,
) -> VLM:
    """Load a model, with its adapter if one is given, as the adapter was trained.

    Args:
        model: See ``choose_model``.
        adapter: Adapter of this package or of PEFT, see ``find_adapter``.
        dtype: Of the base; "auto": as the adapter was trained, else the checkpoint's.
        device: "cpu", "cuda", ... or "auto".
        quantization: "nf4" brings the language model to 4 bits.
        prompt_style: Default: as the adapter was trained, else by the model.

    Raises:
        milora_vl.model.load_errors.LoadError: If the base cannot be loaded.
        ValueError: If the adapter belongs to another model, is damaged, or is of a kind that
            cannot be used here.
        FileNotFoundError: If there is no adapter.
    """
    base, adapter = choose_model(model, adapter)
    found = read_adapter(adapter) if adapter else None
    if found and dtype == "auto" and found.dtype is not None:
        dtype = found.dtype
    vlm = load_vlm(
        base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        revision=found.revision if found and found.base == base else None,
        prompt_style=prompt_style or (found.inputs.get("prompt_style") if found else None),
    )
    return put_on(vlm, found) if found else vlm


def put_on(vlm: VLM, found: Found, *, residual: Residual | None = None) -> VLM:
    """Put an adapter on its base, ready to answer as in training; raises as ``load_tuned``."""
    vlm = apply_inputs(vlm, found.inputs, found.folder)
    if found.is_ours:
        weights = vlm.float_weights
        peft_model = load_adapter(vlm.model, found.folder, residual=residual, weights=weights)
        state = recall(peft_model)
        if state.projector:
            # nothing trains any more: a cast of the whole model must reach the projector too
            remove_master_weights_(trained_projector(peft_model, state.projector))
    else:
        peft_model = load_plain_adapter(vlm.model, found.folder)
    return vlm.with_model(peft_model.eval())


def describe_inputs(vlm: Any, *, pad_to_square: bool | None = None) -> dict[str, Any]:
    """Return what answers depend on beside the weights, for ``milora.json``.

    Args:
        vlm: The model as it is trained.
        pad_to_square: Whether images are padded with the mean color; None: as ``vlm`` says.
    """
    config = vlm.model.config
    vision = getattr(config, "vision_config", None)
    return {
        "prompt_style": vlm.prompt_style.name,
        "pad_to_square": vlm.pad_to_square if pad_to_square is None else pad_to_square,
        "vision_feature_layer": getattr(config, "vision_feature_layer", None),
        "image_size_px": getattr(vision, "image_size", None),
        "special_tokens": sorted(vlm.tokenizer.all_special_tokens),
    }


def apply_inputs(vlm: VLM, inputs: Mapping[str, Any], where: Path) -> VLM:
    """Return the model set up as the adapter was trained; what differs all the same is warned of.

    Args:
        vlm: The base, loaded with the prompt style that the user or the adapter asked for.
        inputs: See ``describe_inputs``; empty for adapters that do not say.
        where: Of the adapter, for the warning.
    """
    if not inputs:
        return vlm
    config, differing = vlm.model.config, []
    vision = getattr(config, "vision_config", None)
    actual = {
        "prompt_style": vlm.prompt_style.name,
        "image_size_px": getattr(vision, "image_size", None),
    }
    for key, value in actual.items():
        expected = inputs.get(key, value)
        if expected != value:
            differing.append(f"{key} {value} (trained with {expected})")
    if missing := set(inputs.get("special_tokens", [])) - set(vlm.tokenizer.all_special_tokens):
        differing.append(f"special tokens without {', '.join(sorted(missing))}")
    if differing:
        logger.warning("%s: answers may suffer from %s", where, "; ".join(differing))
    layer = inputs.get("vision_feature_layer")
    if layer is not None and layer != config.vision_feature_layer:
        config.vision_feature_layer = layer
    return replace(vlm, pad_to_square=inputs.get("pad_to_square", vlm.pad_to_square))


def load_plain_adapter(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """Put a PEFT adapter that others made on a model; every stored tensor must find its place.

    PEFT itself only warns about tensors that fit nowhere, and the model then answers as the base.
    Names of transformers 4.4x, and of the bare text model, are renamed where that is exact.

    Args:
        model: The base, wrapped in place.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: If the weights are missing.
        ValueError: Naming the first tensor that found no place, or the kind that cannot be used.
    """
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise ValueError(
            f"{folder}: {config.peft_type.value} puts trained vectors before the prompt, which "
            "images and cached prefixes would move; only adapters of weights can be used here"
        )
    stored = _read_plain_tensors(folder)
    parameters = {name for name, _ in model.named_parameters()}
    leaves = {name for name, module in model.named_modules() if not any(module.children())}
    prefix = find_family(model).language_model
    named = {_landed_name(key, leaves, parameters, prefix): key for key in stored}
    if len(named) < len(stored):
        raise ValueError(f"{folder / WEIGHTS_FILE}: two tensors have the same place in the model")
    tensors = {name: stored[key] for name, key in named.items()}
    _narrow_to_stored_(config, tensors, leaves, prefix, folder)
    config.inference_mode = True
    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: PEFT cannot put it on this model: {error}") from error
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    for name in sorted(tensors.keys() | expected.keys()):
        key = named.get(name, name)
        if name not in expected:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {key} has no place in {type(model).__name__}; the "
                "adapter was made on another model, or with another version of its names"
            )
        if name not in tensors:
            raise ValueError(f"{folder / WEIGHTS_FILE}: {key} is missing, so it would be random")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {key} has shape {list(tensors[name].shape)}, this model "
                f"needs {list(expected[name].shape)}"
            )
    outcome = set_peft_model_state_dict(peft_model, tensors)
    if outcome.unexpected_keys:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {outcome.unexpected_keys[0]} was not loaded")
    return peft_model.eval()


def _read_plain_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing; weights in pickles (adapter_model.bin) are not read: load them "
            "once with PEFT and save them again"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}; copy the adapter again") from error
    for key, value in tensors.items():
        check_finite(f"{file}: {key}", value)
    return tensors


def _candidates(name: str, language_model: str) -> Iterator[str]:
    """Yield the names a tensor or module may have in this transformers version."""
    yield name
    for pattern, replacement in OLD_NAMES:
        if re.search(pattern, name):
            yield re.sub(pattern, replacement, name)
    if language_model and name.startswith("model."):  # of the bare text model
        yield f"{language_model}.{name.removeprefix('model.')}"


def _landed_name(
    key: str, leaves: Collection[str], parameters: Collection[str], language_model: str
) -> str:
    """Return the key under which PEFT expects a stored tensor; the key itself if none is known.

    Its place is a parameter (``modules_to_save``) or a layer without parts, which PEFT wraps; the
    name of what is put there takes one or two words more.
    """
    for candidate in _candidates(key.removeprefix(PREFIX), language_model):
        owner = LORA_PARTS.sub("", candidate)
        owners = (owner, owner.rpartition(".")[0], owner.rsplit(".", 2)[0])
        if candidate in parameters or any(one in leaves for one in owners):
            return PREFIX + candidate
    return key


def _narrow_to_stored_(
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    leaves: Collection[str],
    language_model: str,
    folder: Path,
) -> None:
    """Let a LoRA reach exactly the layers that have tensors, under their names in this model.

    The names in the file's own configuration may be old ones, or reach the vision tower as well
    (``q_proj`` of a text model).
    """
    owners = {
        LORA_PARTS.sub("", key).removeprefix(PREFIX) for key in tensors if LORA_PARTS.search(key)
    }
    known = sorted(owners & set(leaves))
    if not known:
        return
    config.target_modules = known
    if hasattr(config, "exclude_modules"):
        config.exclude_modules = None
    if hasattr(config, "layers_to_transform"):
        config.layers_to_transform = None
        config.layers_pattern = None
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field, None) or {}
        renamed = {}
        for key, value in pattern.items():
            options = [key, *_candidates(key, language_model)]
            match = next((one for one in options if _reaches(one, known)), None)
            if match is None:
                raise ValueError(
                    f"{folder / PEFT_CONFIG_FILE}: {field} names {key}, which is none of the "
                    "adapted layers of this model"
                )
            renamed[match] = value
        if pattern:
            setattr(config, field, renamed)


def _reaches(pattern: str, names: list[str]) -> bool:
    """Tell whether a key of PEFT's patterns reaches one of the layers, by PEFT's own rule."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
