"""A base model with a saved adapter of any kind: loaded as it was trained, every tensor in place.

All verbs that use an adapter come through here, so that all take the same ones: folders of
``save_adapter``, runs and checkpoints that hold one, plain PEFT adapters, and hub ids of either.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
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
from milora_vl.data.videos import FrameSampling
from milora_vl.model.families import find_family
from milora_vl.model.hub import fetch_folder, is_hub_id
from milora_vl.model.load import VLM, load_vlm

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
    """Tell whether a name is an adapter, or a run or checkpoint with one, and no model.

    A folder or a hub id that is cached; others are taken for models.
    """
    if path is None:
        return False
    if is_hub_id(path):
        cached = [
            try_to_load_from_cache(str(path), name) for name in (PEFT_CONFIG_FILE, "config.json")
        ]
        return isinstance(cached[0], str) and not isinstance(cached[1], str)
    if (Path(path) / "config.json").exists():
        return False
    return _adapter_below(Path(path)) is not None


def find_adapter(path: Path | str) -> Path:
    """Return the adapter folder of a run, a checkpoint, an adapter folder or a hub id.

    Raises:
        FileNotFoundError: If there is none.
        milora_vl.model.load_errors.LoadError: If the hub id is not cached and cannot be fetched.
    """
    folder = Path(path)
    if is_hub_id(path) and Path(path).parent != Path():  # ids of adapters name their owner
        names = (MILORA_FILE, PEFT_CONFIG_FILE, WEIGHTS_FILE)
        patterns = [f"{below}{name}" for below in ("", "adapter/") for name in names]
        folder = fetch_folder(path, patterns, what="adapter")
    elif not folder.exists():
        raise FileNotFoundError(f"{path}: no such folder, and no hub id of an adapter (owner/name)")
    found = _adapter_below(folder)
    if found is None:
        raise FileNotFoundError(
            f"{path}: neither an adapter folder (with {MILORA_FILE} or {PEFT_CONFIG_FILE}) nor a "
            "run or checkpoint with one in adapter/"
        )
    return found


def _adapter_below(folder: Path) -> Path | None:
    for one in (folder, folder / "adapter"):
        if (one / MILORA_FILE).exists() or (one / PEFT_CONFIG_FILE).exists():
            return one
    return None


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
    together: bool = False,
) -> VLM:
    """Load a model, with its adapter if one is given, as the adapter was trained.

    Args:
        model: See ``choose_model``.
        adapter: Adapter of this package or of PEFT, see ``find_adapter``.
        dtype: Of the base; "auto": as the adapter was trained, else the checkpoint's.
        device: "cpu", "cuda", ... or "auto".
        quantization: "nf4" brings the language model to 4 bits.
        prompt_style: Default: as the adapter was trained, else by the model.
        together: As for ``load_adapter``.

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
    return put_on(vlm, found, together=together) if found else vlm


def put_on(
    vlm: VLM, found: Found, *, residual: Residual | None = None, together: bool = False
) -> VLM:
    """Put an adapter on its base, ready to answer as in training; raises as ``load_tuned``."""
    vlm = apply_inputs(vlm, found.inputs, found.folder)
    if found.is_ours:
        weights = vlm.float_weights
        peft_model = load_adapter(
            vlm.model, found.folder, residual=residual, weights=weights, together=together
        )
        state = recall(peft_model)
        if state.projector:
            # nothing trains any more: a cast of the whole model must reach the projector too
            remove_master_weights_(trained_projector(peft_model, state.projector))
    else:
        peft_model = load_plain_adapter(vlm.model, found.folder)
    return vlm.with_model(peft_model.eval())


def describe_inputs(
    vlm: Any, *, pad_to_square: bool | None = None, video_sampling: FrameSampling | None = None
) -> dict[str, Any]:
    """Return what answers depend on beside the weights, for ``milora.json``.

    Args:
        vlm: The model as it is trained.
        pad_to_square: Whether images are padded with the mean color; None: as ``vlm`` says.
        video_sampling: Which frames of videos it was trained on; None: on no video.
    """
    config = vlm.model.config
    vision = getattr(config, "vision_config", None)
    return {
        "prompt_style": vlm.prompt_style.name,
        "pad_to_square": vlm.pad_to_square if pad_to_square is None else pad_to_square,
        "vision_feature_layer": getattr(config, "vision_feature_layer", None),
        "image_size_px": getattr(vision, "image_size", None),
        "special_tokens": sorted(vlm.tokenizer.all_special_tokens),
        **({} if video_sampling is None else {"video": asdict(video_sampling)}),
    }


def apply_inputs(vlm: VLM, inputs: Mapping[str, Any], where: Path) -> VLM:
    """Return the model set up as the adapter was trained; remaining differences are warned of.

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
    sampling = vlm.video_sampling
    if isinstance(video := inputs.get("video"), Mapping):
        sampling = FrameSampling(video["frames"], video["per_second"])
    pads = inputs.get("pad_to_square", vlm.pad_to_square)
    return replace(vlm, pad_to_square=pads, video_sampling=sampling)


@dataclass(frozen=True)
class PlainAdapter:
    """A PEFT adapter of others, under the names of the model it goes on.

    Attributes:
        config: Reaches exactly the layers that have tensors.
        tensors: As PEFT stores them; float32 or what the file holds.
        folder: Where it was read.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    folder: Path


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
    return put_plain_adapter_on(model, read_plain_adapter(model, folder))


def read_plain_adapter(model: PreTrainedModel, folder: Path | str) -> PlainAdapter:
    """Read a PEFT adapter of others for a model, which stays as it is; raises as above."""
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder))
    _check_kind(config, folder)
    stored, names = _read_plain_tensors(folder), {}
    parameters = {name for name, _ in model.named_parameters()}
    leaves = {name for name, module in model.named_modules() if not any(module.children())}
    prefix = find_family(model).language_model
    for key in stored:
        name = _landed_name(key, leaves, parameters, prefix)
        if name in names:
            raise ValueError(f"{folder / WEIGHTS_FILE}: {key} and {names[name]} have one place")
        names[name] = key
    tensors = {name: stored[key] for name, key in names.items()}
    _narrow_to_stored_(config, tensors, leaves, prefix, folder)
    # other starts leave the base as it is; their factors are replaced, so computing them is waste
    if str(getattr(config, "init_lora_weights", None)).lower() in ("gaussian", "eva", "orthogonal"):
        config.init_lora_weights = True
    config.task_type = None  # a head for it would be made at random
    config.inference_mode = True
    return PlainAdapter(config, tensors, folder)


def put_plain_adapter_on(model: PreTrainedModel, adapter: PlainAdapter) -> PeftModel:
    """Put what ``read_plain_adapter`` read on its model, which is wrapped in place.

    Raises:
        ValueError: Naming the first tensor without a place, or of another shape, or that is
            missing.
    """
    folder, tensors = adapter.folder, adapter.tensors
    try:
        peft_model = get_peft_model(model, adapter.config)
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{folder}: PEFT cannot put it on this model: {error}") from error
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    tables = _tables(peft_model)
    for name in sorted(tensors.keys() | expected.keys()):
        # a table may be stored beside what was trained of it, or because its vocabulary grew
        place = expected.get(name, tables.get(name))
        if place is None:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name.removeprefix(PREFIX)} has no place in "
                f"{type(model).__name__}; the adapter was made on another model, or with another "
                "version of its names"
            )
        if name not in tensors:
            raise ValueError(f"{folder / WEIGHTS_FILE}: {name} is missing, so it would be random")
        if tensors[name].shape != place.shape:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {list(tensors[name].shape)}, this "
                f"model needs {list(place.shape)}"
                + ("; tokens were added to it in training" if name in tables else "")
            )
    outcome = set_peft_model_state_dict(peft_model, dict(tensors))
    if outcome.unexpected_keys:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {outcome.unexpected_keys[0]} was not loaded")
    return peft_model.eval()


def _tables(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return the embedding tables, by the names under which PEFT stores them when asked to."""
    base = peft_model.get_base_model()
    tables = {}
    owners = [base.get_input_embeddings(), base.get_output_embeddings()]
    weights = [one.weight for one in owners if one is not None]
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if any(parameter is weight for weight in weights):
            tables[PREFIX + name] = parameter
    return tables


_REFUSED = {
    "LILY": "its experts are mixed by an average over the whole batch, so that an answer depends "
    "on the questions beside it",
    "POLY": "each question needs the number of its task",
    "XLORA": "it mixes adapters that it only names",
    "SHADOW": "it runs a second model beside the base",
    "ADAPTION_PROMPT": "it puts trained vectors into the attention",
}
_LOST_STARTS = ("loftq", "corda", "lora_ga", "pissa_niter")


def _check_kind(config: PeftConfig, folder: Path) -> None:
    """Refuse, by name, what cannot be used as it was trained.

    Raises:
        ValueError: Saying why.
    """
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    file = folder / PEFT_CONFIG_FILE
    if config.is_prompt_learning:
        raise ValueError(
            f"{folder}: {kind} puts trained vectors before the prompt, which images and cached "
            "prefixes would move; only adapters of weights can be used here"
        )
    if kind in _REFUSED:
        raise ValueError(f"{folder}: {kind} cannot be used here: {_REFUSED[kind]}")
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{file}: alora_invocation_tokens: an adapter that starts to act at certain tokens "
            "cannot be used here"
        )
    start = str(getattr(config, "init_lora_weights", None)).lower()
    if start.startswith(_LOST_STARTS):
        raise ValueError(
            f"{file}: init_lora_weights={start}: its start changed the base by values that are not "
            "stored; save it once as a plain LoRA (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if value and not hasattr(config, key) and key != "runtime_config":
            raise ValueError(
                f"{file}: {key}={value} is not known to PEFT {version('peft')}, which would leave "
                "it out; update PEFT"
            )
    if others := sorted(file.name for file in folder.glob("*.bin") if file.name in _BESIDE):
        raise ValueError(
            f"{folder}: {others[0]} beside the adapter would be left out; original LLaVA "
            "checkpoints become a model with `milora-vl convert-llava`"
        )


_BESIDE = ("non_lora_trainables.bin", "mm_projector.bin")


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
    yield f"model.{name}"  # parts were one level higher in transformers 4.4x


def _landed_name(
    key: str, leaves: Collection[str], parameters: Collection[str], language_model: str
) -> str:
    """Return the key under which PEFT expects a stored tensor; the key itself if none is known.

    Its place is a parameter (``modules_to_save``) or a layer without parts, which PEFT wraps; the
    name of what is put there takes one or two words more.
    """
    plain = key.removeprefix(PREFIX).replace(".default.", ".")
    for candidate in _candidates(plain, language_model):
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
