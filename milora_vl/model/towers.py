"""Vision towers by name: loading, their extra tokens, another input size."""

import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionModel,
)

from milora_vl.model.load_errors import explain
from milora_vl.model.open_clip_towers import Tower, load_open_clip_tower
from milora_vl.model.plain_vit import TowerError


def split_vision_name(vision: str) -> tuple[str, str]:
    """Split ``open_clip:NAME/TAG`` or ``hf:ID_OR_FOLDER`` at its first colon.

    Raises:
        TowerError: If it has neither form.
    """
    source, _, name = vision.partition(":")
    if source not in ("open_clip", "hf") or not name:
        raise TowerError(f"vision {vision!r}: write open_clip:NAME/TAG or hf:ID_OR_FOLDER")
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
        config = AutoConfig.from_pretrained(name)
        halves = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
        kind = config.model_type.removesuffix("_vision_model")
        model_class = halves.get(kind, AutoModel)
        model = model_class.from_pretrained(name, dtype=torch.float32, use_safetensors=safe)
        pictures = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise explain(name, error) from error
    side = getattr(model.config, "image_size", None)
    mean, std = getattr(pictures, "image_mean", None), getattr(pictures, "image_std", None)
    if not isinstance(side, int) or not isinstance(getattr(model.config, "patch_size", None), int):
        raise TowerError(f"{name}: {config.model_type!r} is no ViT with one image and patch size")
    if not mean or not std:
        raise TowerError(f"{name}: its image processor names no mean and deviation of the colours")
    return Tower(model.eval(), side, list(mean), list(std))


@torch.no_grad()
def count_extra_tokens(tower: PreTrainedModel, image_size_px: int) -> int:
    """Count the tokens that a tower puts beside its patches, by looking: 0 or 1.

    Raises:
        TowerError: If there are more (register tokens), which LLaVA cannot drop, or the model does
            not take one square picture.
    """
    pixel_values = torch.zeros(1, 3, image_size_px, image_size_px, dtype=tower.dtype)
    try:
        n_tokens = tower(pixel_values.to(tower.device)).last_hidden_state.shape[1]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise TowerError(
            f"{type(tower).__name__} does not turn one square picture into hidden states: {first}"
        ) from error
    n_extra = n_tokens - (image_size_px // tower.config.patch_size) ** 2
    if n_extra not in (0, 1):
        raise TowerError(
            f"the tower gives {n_extra} tokens beside its patches; LLaVA can drop one at most"
        )
    return n_extra


@torch.no_grad()
def resize_tower(tower: PreTrainedModel, image_size_px: int) -> PreTrainedModel:
    """Return a tower for pictures of another size, its position embeddings interpolated.

    Bicubic, as transformers' ``interpolate_pos_encoding``. Towers that interpolate by themselves
    (DINOv2) come back as they are.
    """
    config = tower.config
    if image_size_px == config.image_size or config.model_type.startswith("dinov2"):
        return tower
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
