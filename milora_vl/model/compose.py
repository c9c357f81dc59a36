"""Compose a vision tower and a causal language model into one transformers LLaVA checkpoint.

Towers are loaded by name, and their input size can be changed.
"""

import tempfile
from pathlib import Path

import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.files import check_new_folder, replace_folder
from milora_vl.model.convert_llava import VICUNA_TEMPLATE
from milora_vl.model.hub import fetch_folder
from milora_vl.model.load_errors import check_complete, explain
from milora_vl.model.open_clip import Tower, TowerError, check_open_clip_name, load_open_clip_tower


def split_vision_name(vision: str) -> tuple[str, str]:
    """Split ``open_clip:NAME/TAG`` or ``hf:ID_OR_FOLDER`` at its first colon.

    Raises:
        TowerError: If it has neither form.
    """
    source, _, name = vision.partition(":")
    if source not in ("open_clip", "hf") or not name:
        raise TowerError(
            f"vision {vision!r}: write open_clip:NAME/TAG, open_clip:NAME=FILE or hf:ID_OR_FOLDER"
        )
    return source, name


def load_tower(vision: str, *, allow_pickle: bool = False) -> Tower:
    """Load a tower by ``open_clip:NAME/TAG`` or ``hf:ID_OR_FOLDER``.

    Raises:
        TowerError: If the name has neither form, or the tower cannot be used.
        milora_vl.model.load_errors.LoadError: If it cannot be found.
    """
    source, name = split_vision_name(vision)
    if source == "open_clip":
        return load_open_clip_tower(name)
    safe = None if allow_pickle else True
    try:
        fetch_folder(name, ("config.json",), what="tower")
        config = AutoConfig.from_pretrained(name)
        halves = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
        kind = config.model_type.removesuffix("_vision_model")
        model_class = halves.get(kind, AutoModel)
        model, report = model_class.from_pretrained(
            name, dtype=torch.float32, use_safetensors=safe, output_loading_info=True
        )
        image_processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise explain(name, error) from error
    check_complete(name, model, report, unused="pooler")  # hidden states do not pass it
    side = getattr(model.config, "image_size", None)
    mean, std = (
        getattr(image_processor, "image_mean", None),
        getattr(image_processor, "image_std", None),
    )
    if not isinstance(side, int) or not isinstance(getattr(model.config, "patch_size", None), int):
        raise TowerError(f"{name}: {config.model_type!r} is no ViT with one image and patch size")
    if not mean or not std:
        raise TowerError(f"{name}: its image processor names no mean and deviation of the colors")
    return Tower(model.eval(), side, list(mean), list(std))


@torch.no_grad()
def count_extra_tokens(tower: PreTrainedModel, image_size_px: int) -> int:
    """Return how many tokens a tower adds to its patches, by running it once: 0 or 1.

    Raises:
        TowerError: If there are more (register tokens), which LLaVA cannot drop, or the model does
            not take one square image.
    """
    pixel_values = torch.zeros(1, 3, image_size_px, image_size_px, dtype=tower.dtype)
    try:
        n_tokens = tower(pixel_values.to(tower.device)).last_hidden_state.shape[1]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise TowerError(
            f"{type(tower).__name__} does not turn one square image into hidden states: {first}"
        ) from error
    n_extra = n_tokens - (image_size_px // tower.config.patch_size) ** 2
    if n_extra not in (0, 1):
        raise TowerError(
            f"the tower gives {n_extra} tokens beside its patches; LLaVA can drop one at most"
        )
    return n_extra


@torch.no_grad()
def resize_tower(tower: PreTrainedModel, image_size_px: int) -> PreTrainedModel:
    """Return a tower for images of another size, its position embeddings interpolated.

    Bicubic, as transformers' ``interpolate_pos_encoding``. Towers that interpolate by themselves
    (DINOv2) come back as they are.
    """
    config = tower.config
    if image_size_px == config.image_size or config.model_type.startswith("dinov2"):
        return tower
    # once, here: transformers' LLaVA does not interpolate at run time
    config = type(config).from_dict({**config.to_dict(), "image_size": image_size_px})
    resized = type(tower)(config)
    weights = tower.state_dict()
    target = resized.state_dict()
    for name, value in weights.items():
        if "position_embedding" not in name:
            continue
        table = value.reshape(-1, value.shape[-1])
        old = round(len(table) ** 0.5)
        first = table[: len(table) - old**2]  # the class token's
        grid = table[len(first) :].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        side = image_size_px // config.patch_size
        grid = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        patches = grid.permute(0, 2, 3, 1).reshape(side**2, -1)
        weights[name] = torch.cat([first, patches]).reshape(target[name].shape)
    resized.load_state_dict({k: v for k, v in weights.items() if k in target})
    return resized.eval()


CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without a system text, image first: the demo model's chat template."""


def compose_llava(  # noqa: PLR0913  all but the three parts and the folder by keyword
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    image_size_px: int,
    image_mean: list[float],
    image_std: list[float],
    vision_feature_layer: int | list[int],
    seed: int = 0,
) -> Path:
    """Write a ``LlavaForConditionalGeneration`` checkpoint and its processor.

    The tower has one class token before its patches (CLIP, DINOv2), which is dropped, or none
    (SigLIP); the projector is LLaVA's two-layer MLP with GELU, newly initialized from ``seed``.

    Args:
        vision_tower: A transformers vision model returning hidden states [B, 1 + P, D_vision] or
            [B, P, D_vision] for the given image size.
        language_model: A causal language model with hidden size D.
        tokenizer: Its tokenizer; the image token is added when it is missing.
        folder: Where the checkpoint goes.
        image_size_px: Side of the square input, a multiple of the tower's patch size.
        image_mean: Channel means the tower was trained with, 0-1.
        image_std: Channel standard deviations the tower was trained with.
        vision_feature_layer: Index or indices into the tower's hidden states.
        seed: Seed of the projector's initial weights.

    Returns:
        ``folder``.

    The checkpoint has the language model's dtype.

    Raises:
        ValueError: If ``image_size_px`` is no multiple of the patch size, the tower has no such
            hidden state or puts more than a class token beside its patches, or the output head has
            a bias.
    """
    patch_size = vision_tower.config.patch_size
    if image_size_px % patch_size:
        raise ValueError(f"image size {image_size_px} px is no multiple of the patch, {patch_size}")
    n_extra = count_extra_tokens(vision_tower, image_size_px)
    depth = vision_tower.config.num_hidden_layers
    layers = (
        [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
    )
    if wrong := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
        raise ValueError(f"the tower has hidden states 0 to {depth}, no {wrong[0]}")
    strategy = "default" if n_extra else "full"
    head = language_model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError("the language model's output head has a bias, LLaVA's has none")
    torch.manual_seed(seed)  # for the projector and added embeddings, the only new weights
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        # multiples of 64 suit matrix kernels
        language_model.resize_token_embeddings(
            len(tokenizer), pad_to_multiple_of=64, mean_resizing=False
        )
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector_hidden_act="gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=vision_feature_layer,
        image_seq_length=(image_size_px // patch_size) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).to(language_model.dtype)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = {"height": image_size_px, "width": image_size_px}
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=True,  # LLaVA's rule: a square with the mean color, the aspect ratio kept
            size={"shortest_edge": image_size_px},
            crop_size=size,
            image_mean=image_mean,
            image_std=image_std,
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=n_extra,
        chat_template=choose_template(tokenizer),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def compose_from_names(  # noqa: PLR0913  all but the two parts and the folder by keyword
    vision: str,
    language: str,
    out: Path,
    *,
    projector: str = "mlp2x_gelu",
    image_size_px: int | None = None,
    vision_feature_layer: int = -2,
    dtype: torch.dtype | str = "auto",
    allow_pickle: bool = False,
    seed: int = 0,
) -> Path:
    """Compose a checkpoint from named parts; ``out`` appears whole or not at all.

    Args:
        vision: ``open_clip:NAME/TAG``, or ``hf:`` and the id or folder of a transformers model.
        language: Id or folder of a causal language model.
        out: Where the checkpoint goes; an empty folder or none.
        projector: "mlp2x_gelu", the one that transformers' LLaVA has.
        image_size_px: Side of the images; position embeddings are interpolated to it. None: the
            tower's own.
        vision_feature_layer: Index into the tower's hidden states.
        dtype: Dtype of all weights; "auto": that of the language model's checkpoint.
        allow_pickle: Also read weights that are not safetensors. Pickles can run code.
        seed: Seed of the projector's initial weights.

    Returns:
        ``out``.

    Raises:
        ValueError: If a part is unknown or does not fit.
        FileExistsError: If ``out`` holds something.
        milora_vl.model.load_errors.LoadError: If a part cannot be loaded.
    """
    out = check_new_folder(out)
    if projector != "mlp2x_gelu":
        raise ValueError(f"projector {projector!r}: transformers' LLaVA has mlp2x_gelu alone")
    source, name = split_vision_name(vision)
    if source == "open_clip":
        check_open_clip_name(name)
    safe = None if allow_pickle else True
    try:  # the small files first: a wrong name fails before anything large is fetched
        fetch_folder(language, ("config.json",))
        AutoConfig.from_pretrained(language)
        tokenizer = AutoTokenizer.from_pretrained(language)
        tower = load_tower(vision, allow_pickle=allow_pickle)
        model, report = AutoModelForCausalLM.from_pretrained(
            language, dtype=dtype, use_safetensors=safe, output_loading_info=True
        )
    except TowerError:
        raise
    except (OSError, ValueError) as error:
        raise explain(language, error) from error
    check_complete(language, model, report)
    side = image_size_px or tower.image_size_px
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        made = compose_llava(
            resize_tower(tower.model, side),
            model,
            tokenizer,
            Path(temporary) / out.name,
            image_size_px=side,
            image_mean=tower.image_mean,
            image_std=tower.image_std,
            vision_feature_layer=vision_feature_layer,
            seed=seed,
        )
        replace_folder(made, out)
    return out


def choose_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return ChatML's template if the tokenizer knows its marks, else Vicuna's."""
    if "<|im_start|>" in tokenizer.get_vocab():
        return CHATML_TEMPLATE
    return VICUNA_TEMPLATE.replace("</s>", tokenizer.eos_token)
