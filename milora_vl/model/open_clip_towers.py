"""Vision towers of open_clip -> transformers vision classes with the same features.

Every plain ViT can be expressed: with a class token and a norm before the blocks as CLIP's tower,
with a class token and no such norm (CLIPA, EVA-01) as ViT, without a class token as SigLIP's. What
differs in its arithmetic (EVA-02's and PE's rotary positions, post-norm, ResNets, ConvNeXt) is
refused.
"""

import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from milora_vl.model.plain_vit import PlainViT, TowerError, read_plain_vit, refuse

_VIT_NAMES = {  # releases of transformers differ in them
    "q_proj": ("attention.q_proj", "attention.attention.query"),
    "k_proj": ("attention.k_proj", "attention.attention.key"),
    "v_proj": ("attention.v_proj", "attention.attention.value"),
    "out_proj": ("attention.o_proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "intermediate.dense"),
    "fc2": ("mlp.fc2", "output.dense"),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
}


@dataclass(frozen=True)
class Tower:
    """A vision tower and the pictures it was trained on.

    Attributes:
        model: A transformers vision model.
        image_size_px: Side of its square input.
        image_mean: Channel means, 0-1.
        image_std: Channel standard deviations.
    """

    model: PreTrainedModel
    image_size_px: int
    image_mean: list[float]
    image_std: list[float]


def check_open_clip_name(name: str) -> tuple[str, str]:
    """Split ``NAME/TAG`` and check both against open_clip's own lists; nothing is fetched.

    Raises:
        TowerError: If there is no such model, or no such weights of it; near names are listed.
    """
    import open_clip

    architecture, _, tag = name.partition("/")
    models = open_clip.list_models()
    if architecture not in models:
        near = get_close_matches(architecture, models, n=5, cutoff=0.4)
        raise TowerError(
            f"open_clip has no model {architecture!r}"
            + (f"; near: {', '.join(near)}" if near else "; see open_clip.list_models()")
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        near = get_close_matches(tag, tags, n=1, cutoff=0.6)
        others = [one for one in open_clip.list_pretrained_models_by_tag(tag) if tag]
        raise TowerError(
            f"open_clip has no weights {tag!r} of {architecture}; write {architecture}/TAG with "
            f"one of {', '.join(tags) or 'none (it was never published with weights)'}"
            + (f"; nearest: {near[0]}" if near else "")
            + (f"; {tag} exists for {', '.join(others[:5])}" if others else "")
        )
    return architecture, tag


def load_open_clip_tower(name: str) -> Tower:
    """Load and convert a tower by ``NAME/TAG``, for example ``ViT-B-16/laion2b_s34b_b88k``.

    Weights trained with QuickGELU (``openai`` and others) get it, whatever the model's name says.

    Raises:
        TowerError: If there is no such model or tag, its weights cannot be had, or it cannot be
            expressed.
    """
    import open_clip

    architecture, tag = check_open_clip_name(name)
    quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(architecture, pretrained=tag, force_quick_gelu=quick)
    except (OSError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise TowerError(f"open_clip:{name}: the weights cannot be loaded. {first}") from error
    visual = model.visual.eval()
    size = visual.image_size
    tower = convert_open_clip_tower(visual)
    return Tower(
        tower,
        size[0] if isinstance(size, tuple | list) else size,
        list(visual.image_mean),
        list(visual.image_std),
    )


@torch.no_grad()
def convert_open_clip_tower(visual: nn.Module) -> PreTrainedModel:
    """Convert ``model.visual`` of an open_clip model, or a timm ViT.

    Args:
        visual: open_clip's ``VisionTransformer`` or ``TimmModel``, or timm's ``VisionTransformer``
            or ``Eva``.

    Returns:
        A float32 ``CLIPVisionModel``, ``SiglipVisionModel`` or ``ViTModel``. Its last hidden states
        [B, T, D] are those of the original after the last block; its final norm is the original's.

    Raises:
        TowerError: If it cannot be expressed; the message says why.
    """
    vit = read_plain_vit(visual)
    if "class" not in vit.stem:
        refuse({"a norm before the blocks but no class token": "pre_norm.weight" in vit.stem})
        return _as_siglip(vit)
    return _as_clip(vit) if "pre_norm.weight" in vit.stem else _as_vit(vit)


def _shape(vit: PlainViT) -> dict[str, Any]:
    return {
        "hidden_size": vit.stem["patch.weight"].shape[0],
        "intermediate_size": vit.layers[0]["fc1.weight"].shape[0],
        "num_hidden_layers": len(vit.layers),
        "num_attention_heads": vit.heads,
        "image_size": vit.side_px,
        "patch_size": vit.patch_px,
        "hidden_act": vit.activation,
        "layer_norm_eps": vit.eps,
    }


def _as_clip(vit: PlainViT) -> PreTrainedModel:
    refuse({"bias of the patch embedding beside a norm": "patch.bias" in vit.stem})
    stem = {
        "embeddings.class_embedding": vit.stem["class"],
        "embeddings.patch_embedding.weight": vit.stem["patch.weight"],
        "embeddings.position_embedding.weight": vit.stem["positions"],
        **_renamed(vit.stem, "pre_norm", "pre_layrnorm"),
        **_renamed(vit.stem, "post_norm", "post_layernorm"),
    }
    return _filled(CLIPVisionModel(CLIPVisionConfig(**_shape(vit))), stem | _encoder(vit))


def _as_siglip(vit: PlainViT) -> PreTrainedModel:
    config = SiglipVisionConfig(**_shape(vit), vision_use_head=False)
    stem = {
        **_renamed(vit.stem, "patch", "embeddings.patch_embedding"),
        "embeddings.position_embedding.weight": vit.stem["positions"],
        **_renamed(vit.stem, "post_norm", "post_layernorm"),
    }
    return _filled(SiglipVisionModel(config), stem | _encoder(vit))


def _as_vit(vit: PlainViT) -> PreTrainedModel:
    """Fill a ViT with zeros in its pooler, which LLaVA builds but never asks."""
    model = ViTModel(ViTConfig(**_shape(vit)))
    own = model.state_dict()
    at = next(name for name in own if name.endswith("0.layernorm_before.weight"))
    at = at.removesuffix("0.layernorm_before.weight")
    weights = {
        "embeddings.cls_token": vit.stem["class"][None, None],
        "embeddings.position_embeddings": vit.stem["positions"][None],
        **_renamed(vit.stem, "patch", "embeddings.patch_embeddings.projection"),
        **_renamed(vit.stem, "post_norm", "layernorm"),
    }
    weights |= {n: torch.zeros_like(own[n]) for n in own if n.startswith("pooler.")}
    for index, layer in enumerate(vit.layers):
        for key, value in layer.items():
            name, kind = key.split(".")
            options = (f"{at}{index}.{option}.{kind}" for option in _VIT_NAMES[name])
            weights[next(option for option in options if option in own)] = value
    return _filled(model, weights)


def _encoder(vit: PlainViT) -> dict[str, Tensor]:
    """Return the blocks' weights under the names of CLIP's and SigLIP's encoder."""
    places = {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    weights = {}
    for index, layer in enumerate(vit.layers):
        for key, value in layer.items():
            name, kind = key.split(".")
            place = places.get(name, f"self_attn.{name}")
            weights[f"encoder.layers.{index}.{place}.{kind}"] = value
    return weights


def _renamed(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    start = f"{old}."
    return {
        f"{new}.{key.removeprefix(start)}": value
        for key, value in weights.items()
        if key.startswith(start)
    }


def _filled(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Load the weights; biases that the original lacks are zero."""
    own = {n: value for n, value in model.state_dict().items() if not n.endswith("position_ids")}
    # transformers releases differ in a ``vision_model.`` before every name
    prefix = "vision_model." if next(iter(own)).startswith("vision_model.") else ""
    named = {prefix + name: value.detach().float().clone() for name, value in weights.items()}
    for name in set(own) - set(named):
        if name.endswith(".bias"):
            named[name] = torch.zeros_like(own[name])
    if set(named) != set(own):
        differing = sorted(set(named) ^ set(own))
        raise TowerError(f"weights without a counterpart: {differing[:4]}")
    model.load_state_dict(named, strict=False)
    return model.eval()
