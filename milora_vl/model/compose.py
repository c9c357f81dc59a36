"""Vision tower + causal language model -> one plain transformers LLaVA checkpoint."""

import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.files import check_new_folder, replace_folder
from milora_vl.model.convert_llava import VICUNA_TEMPLATE
from milora_vl.model.load_errors import explain
from milora_vl.model.open_clip_towers import check_open_clip_name
from milora_vl.model.plain_vit import TowerError
from milora_vl.model.towers import (
    count_extra_tokens,
    load_tower,
    resize_tower,
    split_vision_name,
)

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
    (SigLIP); the projector is LLaVA's two-layer MLP with GELU, newly initialised from ``seed``.

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
    torch.manual_seed(seed)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
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
            do_pad=True,  # LLaVA's rule: a square with the mean colour, the aspect ratio kept
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
        image_size_px: Side of the pictures; position embeddings are interpolated to it. None: the
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
    try:  # the small files first: a wrong name is told before anything large is fetched
        AutoConfig.from_pretrained(language)
        tokenizer = AutoTokenizer.from_pretrained(language)
        tower = load_tower(vision, allow_pickle=allow_pickle)
        model = AutoModelForCausalLM.from_pretrained(language, dtype=dtype, use_safetensors=safe)
    except TowerError:
        raise
    except (OSError, ValueError) as error:
        raise explain(language, error) from error
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
