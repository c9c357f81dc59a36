"""A merged model as GGUF files in llama.cpp's layout: the language model, and tower + projector.

Names and layout are those of llama.cpp's own converter (conversion/llama.py, qwen.py) and of its
reader for LLaVA (tools/mtmd/clip.cpp, models/llava.cpp). Each file is read back: its tensors,
brought back into the layout of transformers, must give the logits of the live model.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from milora_vl.errors import MiloraError

TEXT_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PERMUTED = ("llama",)
"""Architectures whose rotary pairs llama.cpp keeps side by side, not half a head apart."""
PRE_TOKENIZERS = (  # what tokenizer.json says of it -> llama.cpp's name for it
    (r"\p{N}{1,3}", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", "qwen2"),
    ('"individual_digits": true', "smollm"),
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class GgufError(MiloraError, ValueError):
    """A model that cannot be written for llama.cpp here; the text names the part."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor goes.

    Attributes:
        source: Its name in the transformers model.
        target: Its name in the file.
        n_heads: Heads whose rotary pairs are put side by side; 0 leaves it as it is.
    """

    source: str
    target: str
    n_heads: int = 0


def interleave(weight: Tensor, n_heads: int) -> Tensor:
    """Put the two halves of each head's rows side by side, as llama.cpp's rotation reads them."""
    shape = (n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape)


def separate(weight: Tensor, n_heads: int) -> Tensor:
    """Undo ``interleave``."""
    shape = (n_heads, weight.shape[0] // n_heads // 2, 2, *weight.shape[1:])
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: PreTrainedModel, processor: Any, folder: Path) -> list[str]:
    """Write ``model.gguf``, and ``mmproj.gguf`` if the model has a vision tower.

    Args:
        model: Merged, LLaVA-1.5-like or a language model alone; values keep their precision.
        processor: Its processor or tokenizer.
        folder: Where the files go.

    Returns:
        The names of the files.

    Raises:
        GgufError: Naming the part that is not known here.
    """
    check_model(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    fields = tokenizer_fields(tokenizer, model.config.get_text_config().vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    _write(folder / TEXT_FILE, text_fields(model, processor), fields, text_entries(model), state)
    if not has_tower(model):
        return [TEXT_FILE]
    vision = vision_fields(model, processor.image_processor)
    _write(folder / VISION_FILE, vision, {}, vision_entries(model), state)
    return [TEXT_FILE, VISION_FILE]


def read_back_(model: PreTrainedModel, folder: Path) -> None:
    """Fill a model from the files, so that it computes what they hold.

    Raises:
        GgufError: If a tensor is missing, has another shape, or is one too many.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    parts = [(TEXT_FILE, text_entries(model))]
    if has_tower(model):
        parts.append((VISION_FILE, vision_entries(model)))
    state = model.state_dict()
    for name, entries in parts:
        reader = GGUFReader(folder / name)
        found = {tensor.name: tensor for tensor in reader.tensors}
        expected = {entry.target for entry in entries}
        if found.keys() != expected:
            raise GgufError(f"{folder / name}: {sorted(found.keys() ^ expected)[0]} is astray")
        for entry in entries:
            tensor, place = found[entry.target], state[entry.source]
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            shape = tuple(reversed(tensor.shape.tolist()))
            if shape != tuple(place.shape):
                raise GgufError(f"{folder / name}: {entry.target} has shape {shape}")
            values = values.reshape(shape)
            place.copy_(separate(values, entry.n_heads) if entry.n_heads else values)


def has_tower(model: PreTrainedModel) -> bool:
    """Tell whether a model reads images."""
    return model.config.model_type == "llava"


def check_model(model: PreTrainedModel) -> None:
    """Refuse what llama.cpp's graph for LLaVA, or this writer, does not know.

    Raises:
        GgufError: Naming the part.
    """
    config, text = model.config, model.config.get_text_config()
    if text.model_type not in ARCHITECTURES:
        raise GgufError(
            f"the language model is a {text.model_type}; GGUF is written for "
            f"{', '.join(ARCHITECTURES)}. Use --form merged and llama.cpp's own converter"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise GgufError(f"rotary positions of type {rope['rope_type']} are not written here")
    if config is text:
        return
    if not has_tower(model):
        raise GgufError(f"{config.model_type} is no LLaVA-1.5; its images cannot be written here")
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise GgufError(f"the tower is a {vision.model_type}; llama.cpp's LLaVA takes CLIP towers")
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise GgufError(f"a tower with {vision.hidden_act} is not known to llama.cpp's LLaVA")
    if config.projector_hidden_act != "gelu":
        raise GgufError(f"a projector with {config.projector_hidden_act} is not known there")
    if not isinstance(config.vision_feature_layer, int):
        raise GgufError("features of several layers are not written here")
    if config.vision_feature_select_strategy != "default":
        raise GgufError("llama.cpp's LLaVA drops the class token, and this model keeps it")


def _language_prefix(model: PreTrainedModel) -> str:
    return "model.language_model." if has_tower(model) else "model."


def text_entries(model: PreTrainedModel) -> list[Entry]:
    """Return where each tensor of the language model goes.

    Raises:
        GgufError: If one has no place.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    text, prefix = model.config.get_text_config(), _language_prefix(model)
    arch = ARCHITECTURES[text.model_type]
    known = get_tensor_name_map(MODEL_ARCH[arch.upper()], text.num_hidden_layers)
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    entries = []
    for name in model.state_dict():
        if name != "lm_head.weight" and not name.startswith(prefix):
            continue
        if name == "lm_head.weight" and text.tie_word_embeddings:
            continue
        plain = name if name == "lm_head.weight" else f"model.{name.removeprefix(prefix)}"
        target = known.get_name(plain, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise GgufError(f"{name} has no place in llama.cpp's {arch}")
        layer = plain.rsplit(".", 2)[-2]
        entries.append(Entry(name, target, heads.get(layer, 0) if arch in PERMUTED else 0))
    return entries


def n_vision_layers(model: PreTrainedModel) -> int:
    """Return how many layers of the tower the features pass."""
    total, layer = model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer
    return total + 1 + layer if layer < 0 else layer


VISION_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
VISION_LAYERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip
PROJECTOR_NAMES = {"linear_1": "mm.0", "linear_2": "mm.2"}


def vision_entries(model: PreTrainedModel) -> list[Entry]:
    """Return where each tensor of the tower's used layers and of the projector goes."""
    names = list(model.state_dict())
    tower = next(name for name in names if name.endswith("embeddings.class_embedding"))
    prefix = tower.removesuffix("embeddings.class_embedding")
    found = {f"{prefix}{source}": target for source, target in VISION_NAMES.items()}
    for index in range(n_vision_layers(model)):
        for source, target in VISION_LAYERS.items():
            for kind in ("weight", "bias"):
                name = f"{prefix}encoder.layers.{index}.{source}.{kind}"
                found[name] = f"v.blk.{index}.{target}.{kind}"
    for name in names:
        if ".multi_modal_projector." in f".{name}":
            layer, kind = name.split(".")[-2:]
            found[name] = f"{PROJECTOR_NAMES[layer]}.{kind}"
    return [Entry(source, target) for source, target in found.items()]


def text_fields(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """Return the metadata of the language model, by llama.cpp's keys."""
    text = model.config.get_text_config()
    arch = ARCHITECTURES[text.model_type]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    fields = {
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "rope.dimension_count": head,
        "vocab_size": text.vocab_size,
    }
    found = {"general.architecture": arch, **{f"{arch}.{key}": v for key, v in fields.items()}}
    template = getattr(processor, "chat_template", None)
    template = template or getattr(processor, "tokenizer", processor).chat_template
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found


def vision_fields(model: PreTrainedModel, image_processor: Any) -> dict[str, Any]:
    """Return the metadata of tower and projector, by llama.cpp's keys."""
    vision, layers = model.config.vision_config, n_vision_layers(model)
    fields = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": vision.projection_dim,
        "block_count": layers,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        "image_mean": [float(value) for value in image_processor.image_mean],
        "image_std": [float(value) for value in image_processor.image_std],
        # explicit, since the reader's own default is the last layer but one of those in the file
        "feature_layer": [layers],
    }
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.hidden_act == "gelu",
        **{f"clip.vision.{key}": value for key, value in fields.items()},
    }


def tokenizer_fields(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Return the tokenizer as llama.cpp reads it: tokens, their types, merges or scores.

    Args:
        tokenizer: A fast tokenizer with a BPE model.
        vocab_size: Rows of the embedding; tokens without a text are filled in.

    Raises:
        GgufError: If its kind is not known here.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE":
        raise GgufError(f"a tokenizer with a {backend['model']['type']} model is not written here")
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    types = [_token_type(number, by_id, added, tokenizer) for number in range(vocab_size)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in backend["model"]["merges"]]
    fields: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if backend["model"].get("byte_fallback"):
        fields |= {"model": "llama", "scores": _scores(tokens, merges)}
        fields["add_space_prefix"] = any(
            part in json.dumps(backend) for part in ('"Prepend"', '"prepend_scheme": "first"')
        )
    else:
        fields |= {"model": "gpt2", "pre": _pre_tokenizer(backend), "merges": merges}
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            fields[{"unk": "unknown", "pad": "padding"}.get(name, name) + "_token_id"] = number
    starts = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    fields["add_bos_token"] = tokenizer.bos_token_id is not None and starts
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def _token_type(
    number: int, by_id: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], tokenizer: Any
) -> int:
    if number not in by_id:
        return UNUSED
    if number == tokenizer.unk_token_id:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    token = by_id[number]
    return BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores that make llama.cpp merge in the order of the merges."""
    order = {
        one.replace(" ", "", 1): -float(place) for place, one in reversed([*enumerate(merges)])
    }
    return [order.get(token, -1e6) for token in tokens]


def _pre_tokenizer(backend: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how text is split before merging.

    Raises:
        GgufError: If it is none of those known here.
    """
    found = backend.get("pre_tokenizer") or {}
    text = json.dumps(found).replace("\\\\", "\\")
    for mark, name in PRE_TOKENIZERS:
        if mark in text:
            return name
    if found.get("type") == "ByteLevel" and found.get("use_regex", True):
        return "gpt-2"
    raise GgufError(
        f"llama.cpp's name of this tokenizer's splitting is not known here: {text[:200]}"
    )


def _write(
    path: Path,
    fields: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    entries: list[Entry],
    state: Mapping[str, Tensor],
) -> None:
    """Write one file: matrices in their own precision, vectors in float32."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, fields["general.architecture"])
    for key, value in {**fields, **tokenizer}.items():
        if key != "general.architecture":  # the writer's own
            _adder(writer, value)(key, value)
    for entry, (data, kind) in _tensors(entries, state):
        writer.add_tensor(entry.target, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adder(writer: Any, value: Any) -> Callable[[str, Any], None]:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    return getattr(writer, f"add_{kinds[type(value)]}")


def _tensors(
    entries: list[Entry], state: Mapping[str, Tensor]
) -> Iterator[tuple[Entry, tuple[np.ndarray, Any]]]:
    from gguf import GGMLQuantizationType

    for entry in entries:
        value = state[entry.source].detach().cpu()
        value = (interleave(value, entry.n_heads) if entry.n_heads else value).contiguous()
        is_matrix = value.ndim > 1 and not entry.target.startswith("v.position")
        if value.dtype == torch.bfloat16 and is_matrix and value.ndim == 2:
            data = value.view(torch.uint16).numpy().view(np.uint8)  # [rows, 2 * columns]
            yield entry, (data, GGMLQuantizationType.BF16)
        elif value.dtype == torch.float16 and is_matrix:
            yield entry, (value.numpy(), None)
        else:
            yield entry, (value.float().numpy(), None)
