"""Original LLaVA-1.5 checkpoints -> one plain transformers LLaVA checkpoint.

Three layouts are read: a whole model; ``mm_projector.bin`` of stage 1 beside a base language model;
LoRA weights with ``non_lora_trainables.bin`` beside a base language model. Pickles are read with
``torch.load(weights_only=True)`` alone, which refuses anything but tensors.
"""

import json
import logging
import math
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedConfig,
)

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.files import check_new_folder, replace_folder
from milora_vl.model.hub import fetch_folder
from milora_vl.model.load_errors import LoadError, check_complete, explain

logger = logging.getLogger(__name__)

VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}A chat between a curious user and an "
    "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
    "to the user's questions. {% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% endif %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "\n"
    "{% endif %}{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's prompt with its system sentence and no space at the end."""

_PROJECTOR = {"0": "linear_1", "2": "linear_2"}
_LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PROJECTOR_FILES = ("non_lora_trainables.bin", "mm_projector.bin")
_LORA_SETTINGS = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("peft_version", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias"),
        *("target_modules", "exclude_modules", "modules_to_save", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("use_dora", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
        *("ensure_weight_tying",),
    )
)
"""Fields of a LoRA's configuration that are honoured, or say nothing about its values."""
_KEEPS_BASE = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Starts of a LoRA that leave the base as it is."""
_TEXT_TYPES = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}


def convert_llava(
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    vision: str | None = None,
    dtype: torch.dtype | str = torch.float16,
) -> Path:
    """Convert a checkpoint in the original layout.

    Args:
        source: Folder with ``config.json`` and the weights.
        out: Where the transformers checkpoint goes; an empty folder or none.
        base: Id or folder of the language model that a projector or LoRA belongs to.
        vision: Id or folder of the CLIP tower; None: ``mm_vision_tower`` of the config.
        dtype: Dtype of the written weights. A LoRA is merged in float32.

    Returns:
        ``out``.

    Raises:
        LoadError: If a part is missing, a file is no plain tensor file, or the model has something
            that ``LlavaForConditionalGeneration`` cannot express.
        FileExistsError: If ``out`` holds something.
    """
    out = check_new_folder(out)
    settings = _read_settings(source)
    language = Path(base) if base and Path(base).exists() else base or source
    trained = _read_first(source, _PROJECTOR_FILES)
    lora = _read_first(source, _LORA_FILES)
    if base is None and (lora or (trained and not _weight_files(source))):
        raise LoadError(
            f"{source} holds a projector or LoRA only; name the language model it was trained on, "
            "for example --base lmsys/vicuna-7b-v1.5"
        )
    if base is not None and _weight_files(source):
        raise LoadError(f"{source} holds a whole model, which --base would replace; leave one out")
    weights = {_plain_name(name): value for name, value in _read_language_model(language).items()}
    for name, value in trained.items():
        own = weights.get(_plain_name(name)) if base is None else None
        if own is not None and not torch.equal(own.float(), value.float()):
            # published checkpoints keep the projector of stage 1 beside the finetuned model
            logger.warning("%s: %s beside the whole model is not used", source, name)
            continue
        weights[_plain_name(name)] = value
    if lora:
        _merge_lora_(weights, lora, _read_lora_settings(source))
    tower_name = vision or settings.get("mm_vision_tower")
    if not tower_name:
        raise LoadError(f"{source}: config.json names no mm_vision_tower; give one with --vision")
    try:
        fetch_folder(tower_name, ("config.json",), what="vision tower")
        tower, report = CLIPVisionModel.from_pretrained(
            tower_name, use_safetensors=None, output_loading_info=True
        )
        image_processor = AutoImageProcessor.from_pretrained(tower_name)
        holder = source if (source / "tokenizer_config.json").exists() else language
        tokenizer = AutoTokenizer.from_pretrained(holder)
        text_config = _text_config(settings) if base is None else AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise explain(str(tower_name), error) from error
    check_complete(str(tower_name), tower, report)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text_config.vocab_size = max(-(-len(tokenizer) // 64) * 64, text_config.vocab_size)
    keeps_class = settings.get("mm_vision_select_feature", "patch") == "cls_patch"
    side, patch = tower.config.image_size, tower.config.patch_size
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_id=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full" if keeps_class else "default",
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        image_seq_length=(side // patch) ** 2 + keeps_class,
        tie_word_embeddings=False,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    _load_weights_(model, weights, tower)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=settings.get("image_aspect_ratio", "pad") == "pad",
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        made = Path(temporary) / out.name
        model.save_pretrained(made)
        processor.save_pretrained(made)
        replace_folder(made, out)
    return out


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Read a ``.bin`` file of tensors; nothing in it is run.

    Raises:
        LoadError: If it holds anything but named tensors.
    """
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise LoadError(
            f"{file}: not a plain file of tensors, so it is not read. {first}"
        ) from error
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise LoadError(f"{file}: expected named tensors")
    return dict(values)


def _read_settings(source: Path) -> dict[str, Any]:
    try:
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{source}: no config.json; give the folder of the checkpoint") from error
    projector = settings.get("mm_projector_type", "linear")
    problems = {
        f"its projector is {projector!r}, transformers' LLaVA has mlp2x_gelu only": projector
        != "mlp2x_gelu",
        "images stand between <im_start> and <im_end>": settings.get("mm_use_im_start_end"),
        "images are cut into tiles (LLaVA-1.6)": "anyres"
        in str(settings.get("image_aspect_ratio", "")),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise LoadError(f"{source} cannot be converted: {problem}")
    return settings


def _text_config(settings: dict[str, Any]) -> PreTrainedConfig:
    kind = _TEXT_TYPES.get(settings.get("model_type", ""))
    if kind is None:
        raise LoadError(
            f"model type {settings.get('model_type')!r} is none of {', '.join(_TEXT_TYPES)}"
        )
    foreign = (
        "mm_",
        "image_",
        "tune_",
        "freeze_",
        "use_mm",
        "model_type",
        "architectures",
        "dtype",
    )
    kept = {k: v for k, v in settings.items() if not k.startswith((*foreign, "torch_dtype"))}
    return AutoConfig.for_model(kind, **kept)


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def fetch_original(source: str) -> Path:
    """Return the folder of a checkpoint in the original layout: as given, or fetched from the hub.

    Raises:
        LoadError: If it is neither a folder nor a hub id that can be reached.
    """
    return fetch_folder(source, ("*.json", "*.bin", "*.safetensors", "tokenizer*"))


def _read_language_model(name: Path | str) -> dict[str, Tensor]:
    folder = fetch_original(str(name))
    files = _weight_files(folder)
    if not files:
        raise LoadError(f"{folder}: no model*.safetensors or pytorch_model*.bin")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
    return weights


def _read_lora_settings(source: Path) -> dict[str, Any]:
    file = source / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return {**settings, "lora_alpha": float(settings["lora_alpha"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file}: cannot be read, so the LoRA has no scale: {error!r}") from error


def _read_first(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    for name in names:
        if (folder / name).exists():
            file = folder / name
            return load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
    return {}


def _plain_name(name: str) -> str:
    """Name a weight as the whole original model does: without PEFT's prefix."""
    name = name.removeprefix("base_model.model.")
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _merge_lora_(
    weights: dict[str, Tensor], lora: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Put a LoRA into the weights, in float32, rounded once; every tensor of it must be used.

    Layers and embeddings get W + s B A, with DoRA scaled to the rows' stored lengths; what was
    trained in full (``modules_to_save``, biases, embeddings) takes the place of the old values.

    Raises:
        LoadError: Naming the first tensor or setting that this does not express.
    """
    _check_lora_settings(settings)
    left = {name.removeprefix("base_model.model."): value for name, value in lora.items()}
    if len(left) < len(lora):
        raise LoadError("the LoRA holds two tensors of the same name")
    for name in [name for name in left if ".lora_" not in name]:
        # embeddings are stored beside their factors: the factors are added to what is stored
        target = _plain_name(re.sub(r"\.(modules_to_save|base_layer|default)\b", "", name))
        if target not in weights or left[name].shape != weights[target].shape:
            raise _without_place(name)
        weights[target] = left.pop(name).to(weights[target].dtype)
    starts = [name for name in left if name.endswith((".lora_A.weight", ".lora_embedding_A"))]
    for name in starts:
        module = re.sub(r"\.lora_(?:embedding_)?A(?:\.weight)?$", "", name)
        down, up = left.pop(name).float(), left.pop(_other_factor(name), None)
        length = left.pop(f"{module}.lora_magnitude_vector", None)  # [d_out] of a DoRA
        target = _plain_name(f"{module}.weight")
        if target not in weights:
            raise LoadError(f"the LoRA has weights for {target}, which the base lacks")
        if (length is not None) != bool(settings.get("use_dora")):
            raise LoadError(f"use_dora={settings.get('use_dora')} does not fit {name}")
        if up is None or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise LoadError(f"the LoRA has no factor lora_B that fits {name}")
        change = _scaling(settings, module, len(down)) * (up.float() @ down)  # [d_out, d_in]
        change = change.T if "embedding" in name else change  # embeddings are [V, D]
        weights[target] = _add(weights[target], change, length, target)
    if left:
        raise _without_place(next(iter(left)))


def _without_place(name: str) -> LoadError:
    return LoadError(
        f"the LoRA folder holds {name}, which has no place in the base; merge it with PEFT first"
    )


def _add(weight: Tensor, change: Tensor, length: Tensor | None, name: str) -> Tensor:
    if change.shape != weight.shape:
        raise LoadError(f"the LoRA changes {list(change.shape)} of {name}: {list(weight.shape)}")
    merged = weight.float() + change
    if length is not None:
        merged *= (length.float() / merged.norm(dim=1))[:, None]
    return merged.to(weight.dtype)


def _other_factor(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")


def _scaling(settings: Mapping[str, Any], module: str, r: int) -> float:
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, module), settings["lora_alpha"])
    return alpha / (math.sqrt(r) if settings.get("use_rslora") else r)


def _check_lora_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what ``_merge_lora_`` does not express; fields that are not known are not harmless.

    Raises:
        LoadError: Naming the first such field.
    """
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise LoadError(f"the adapter is of kind {kind}, not LORA; merge it with PEFT first")
    for key, value in settings.items():
        if value and key not in _LORA_SETTINGS:
            raise LoadError(f"the LoRA has {key}={value}; merge it with PEFT first")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start not in _KEEPS_BASE:
        raise LoadError(
            f"the LoRA started as {start!r}, which changed its base; convert it to a plain LoRA "
            "or merge it with PEFT first"
        )


def _load_weights_(model: Any, weights: dict[str, Tensor], tower: CLIPVisionModel) -> None:
    """Put the weights where transformers' LLaVA keeps them; every one must find its place."""
    projector, language, seen, head = _sort_weights(weights)
    own = tower.state_dict()
    trained = {
        key: seen.pop(key.removeprefix("vision_model."), value) for key, value in own.items()
    }
    if strange := [key for key in seen if not key.endswith("position_ids")]:
        raise LoadError(f"the vision tower of the checkpoint holds {strange[0]}, CLIP's does not")
    if "embed_tokens.weight" not in language:
        raise LoadError("the language model lacks model.embed_tokens.weight")
    if not head and not model.config.text_config.tie_word_embeddings:
        raise LoadError(
            "the language model lacks lm_head.weight, and its config ties no embeddings"
        )
    head = head or {"weight": language["embed_tokens.weight"]}
    rows = model.config.text_config.vocab_size
    language["embed_tokens.weight"] = _grow(language["embed_tokens.weight"], rows)
    head["weight"] = _grow(head["weight"], rows)
    if set(projector) != set(model.model.multi_modal_projector.state_dict()):
        raise LoadError(f"the projector's weights are {sorted(projector) or 'missing'}")
    try:
        model.model.multi_modal_projector.load_state_dict(projector)
        model.model.language_model.load_state_dict(language)
        model.model.vision_tower.load_state_dict(trained)
        model.lm_head.load_state_dict(head)
    except RuntimeError as error:
        raise LoadError(f"the weights do not fit the model of config.json: {error}") from error
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LoadError(
                f"values of {name} are NaN or infinite in {parameter.dtype}; if the checkpoint's "
                "are not, give --dtype bfloat16"
            )


def _sort_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """Return the weights of projector, language model, tower and head, by their names in each."""
    projector, language, tower, head = {}, {}, {}, {}
    for name, value in weights.items():
        short = name.removeprefix("model.")
        if short.startswith("mm_projector."):
            index, _, kind = short.removeprefix("mm_projector.").partition(".")
            projector[f"{_PROJECTOR.get(index, index)}.{kind}"] = value
        elif short.startswith("vision_tower."):
            tower[name.rpartition("vision_model.")[2]] = value
        elif name == "lm_head.weight":
            head["weight"] = value
        elif not name.startswith("model."):
            raise LoadError(f"the checkpoint holds {name}, for which LLaVA has no place")
        elif not name.endswith("rotary_emb.inv_freq"):  # computed from config.json
            language[short] = value
    return projector, language, tower, head


def _grow(table: Tensor, rows: int) -> Tensor:
    """Add mean rows: the new tokens' logits are then never the largest."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(max(rows - len(table), 0), -1)])
