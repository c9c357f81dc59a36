"""Vision towers of open_clip -> transformers vision classes with the same features.

Four kinds of plain ViT can be expressed: open_clip's own (GELU or QuickGELU), timm's CLIP form with
a norm before the blocks, timm's SigLIP form without a class token, and timm's ViT with one. What
differs in its arithmetic (EVA-02's rotary positions, layer scale, ResNets, ConvNeXt) is refused.
"""

from dataclasses import dataclass
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


class TowerError(ValueError):
    """A tower that no transformers class computes; the text says what stands in the way."""


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


def load_open_clip_tower(name: str) -> Tower:
    """Load and convert a tower by ``NAME/TAG``, for example ``ViT-B-16/laion2b_s34b_b88k``.

    Raises:
        TowerError: If there is no such model or tag, its weights cannot be had, or it cannot be
            expressed.
    """
    import open_clip

    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise TowerError(f"open_clip has no model {architecture!r}; see open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise TowerError(
            f"open_clip has no weights {tag!r} of {architecture}; write {architecture}/TAG with "
            f"one of {', '.join(tags) or 'none'}"
        )
    try:
        visual = open_clip.create_model(architecture, pretrained=tag).visual.eval()
    except (OSError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise TowerError(f"open_clip:{name}: the weights cannot be loaded. {first}") from error
    size = visual.image_size
    return Tower(
        convert_open_clip_tower(visual),
        size[0] if isinstance(size, tuple | list) else size,
        list(visual.image_mean),
        list(visual.image_std),
    )


@torch.no_grad()
def convert_open_clip_tower(visual: nn.Module) -> PreTrainedModel:
    """Convert ``model.visual`` of an open_clip model, or a timm ViT.

    Args:
        visual: open_clip's ``VisionTransformer`` or ``TimmModel``, or timm's ``VisionTransformer``.

    Returns:
        A float32 ``CLIPVisionModel``, ``SiglipVisionModel`` or ``ViTModel``. Its last hidden states
        [B, T, D] are those of the original after the last block; its final norm is the original's.

    Raises:
        TowerError: If it cannot be expressed; the message says why.
    """
    trunk = getattr(visual, "trunk", visual)
    kind = f"{type(trunk).__module__.partition('.')[0]}.{type(trunk).__name__}"
    if kind == "open_clip.VisionTransformer":
        return _from_open_clip(trunk)
    if kind == "timm.VisionTransformer":
        return _from_timm(trunk)
    raise TowerError(
        f"{kind} is no plain ViT: transformers' CLIP, SigLIP and ViT classes do not compute it"
    )


def _from_open_clip(visual: Any) -> CLIPVisionModel:
    blocks = visual.transformer.resblocks
    _refuse(
        {
            "layer scale": any(isinstance(m, nn.Module) and list(m.parameters()) for b in blocks
                               for m in (b.ls_1, b.ls_2)),
            "no norm before the blocks": not isinstance(visual.ln_pre, nn.LayerNorm),
            "sine-cosine positions that are no parameter": visual.positional_embedding is None,
        }
    )  # fmt: skip
    config = _clip_config(
        visual.conv1,
        len(visual.positional_embedding) - 1,
        blocks[0].mlp.c_fc.out_features,
        len(blocks),
        blocks[0].attn.num_heads,
        _activation(blocks[0].mlp.gelu),
        visual.ln_post.eps,
    )
    # behind an attention pool (CoCa) the norm is of the pooled width, not of the tokens
    pooled = getattr(visual, "attn_pool", None) is not None
    norm = nn.LayerNorm(config.hidden_size) if pooled else visual.ln_post
    weights = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        **_pair("pre_layrnorm", visual.ln_pre),
        **_pair("post_layernorm", norm),
    }
    for index, block in enumerate(blocks):
        at = f"encoder.layers.{index}."
        weights |= _split_qkv(at, block.attn.in_proj_weight, block.attn.in_proj_bias)
        weights |= _pair(f"{at}self_attn.out_proj", block.attn.out_proj)
        weights |= _pair(f"{at}layer_norm1", block.ln_1) | _pair(f"{at}layer_norm2", block.ln_2)
        weights |= _pair(f"{at}mlp.fc1", block.mlp.c_fc) | _pair(f"{at}mlp.fc2", block.mlp.c_proj)
    return _filled(CLIPVisionModel(config), weights)


def _from_timm(trunk: Any) -> PreTrainedModel:
    blocks = trunk.blocks
    first = blocks[0]
    _refuse(
        {
            "layer scale": any(list(m.parameters()) for b in blocks for m in (b.ls1, b.ls2)),
            "norms of queries and keys": bool(list(first.attn.q_norm.parameters())),
            "gated MLP": not (hasattr(first.mlp, "fc1") and not hasattr(first.mlp, "fc1_g")),
            "register tokens": trunk.num_prefix_tokens > 1,
            "class token without a position": getattr(trunk, "no_embed_class", False),
            "another kind of block": type(first).__name__ != "Block",
        }
    )
    has_class = trunk.cls_token is not None
    convolution = trunk.patch_embed.proj
    n_patches = trunk.pos_embed.shape[1] - has_class
    activation, eps = _activation(first.mlp.act), trunk.blocks[0].norm1.eps
    shape = (convolution, n_patches, first.mlp.fc1.out_features, len(blocks), first.attn.num_heads)
    if has_class and isinstance(trunk.norm_pre, nn.LayerNorm):
        return _timm_clip(trunk, _clip_config(*shape, activation, eps))
    _refuse({"norm before the blocks": isinstance(trunk.norm_pre, nn.LayerNorm)})
    shared = {
        "hidden_size": convolution.out_channels,
        "intermediate_size": shape[2],
        "num_hidden_layers": shape[3],
        "num_attention_heads": shape[4],
        "image_size": _side(n_patches) * convolution.kernel_size[0],
        "patch_size": convolution.kernel_size[0],
        "hidden_act": activation,
        "layer_norm_eps": eps,
    }
    if has_class:
        return _timm_vit(trunk, ViTConfig(**shared, qkv_bias=first.attn.qkv.bias is not None))
    model = SiglipVisionModel(SiglipVisionConfig(**shared, vision_use_head=False))
    weights = _encoder_weights(trunk) | {
        "embeddings.position_embedding.weight": trunk.pos_embed[0],
        **_pair("embeddings.patch_embedding", convolution),
        **_pair("post_layernorm", _final_norm(trunk)),
    }
    return _filled(model, weights)


def _timm_clip(trunk: Any, config: CLIPVisionConfig) -> CLIPVisionModel:
    _refuse({"bias of the patch embedding": trunk.patch_embed.proj.bias is not None})
    weights = _encoder_weights(trunk) | {
        "embeddings.class_embedding": trunk.cls_token.flatten(),
        "embeddings.patch_embedding.weight": trunk.patch_embed.proj.weight,
        "embeddings.position_embedding.weight": trunk.pos_embed[0],
        **_pair("pre_layrnorm", trunk.norm_pre),
        **_pair("post_layernorm", _final_norm(trunk)),
    }
    return _filled(CLIPVisionModel(config), weights)


def _timm_vit(trunk: Any, config: ViTConfig) -> ViTModel:
    """Fill a ViT; its weight names are found by kind, they changed between releases."""
    model = ViTModel(config, add_pooling_layer=False)
    own = model.state_dict()
    prefix = next(name for name in own if name.endswith("0.layernorm_before.weight"))
    stem = prefix.removesuffix("0.layernorm_before.weight")
    names = {
        "q_proj": ("attention.q_proj", "attention.attention.query"),
        "k_proj": ("attention.k_proj", "attention.attention.key"),
        "v_proj": ("attention.v_proj", "attention.attention.value"),
        "out_proj": ("attention.o_proj", "attention.output.dense"),
        "fc1": ("mlp.fc1", "intermediate.dense"),
        "fc2": ("mlp.fc2", "output.dense"),
        "layer_norm1": ("layernorm_before",),
        "layer_norm2": ("layernorm_after",),
    }
    weights = {
        "embeddings.cls_token": trunk.cls_token,
        "embeddings.position_embeddings": trunk.pos_embed,
        **_pair("embeddings.patch_embeddings.projection", trunk.patch_embed.proj),
        **_pair("layernorm", _final_norm(trunk)),
    }
    for name, value in _encoder_weights(trunk).items():
        _, _, index, rest = name.split(".", 3)
        short, kind = rest.rsplit(".", 1)
        for option in names[short.rpartition(".")[2]]:
            if f"{stem}{index}.{option}.{kind}" in own:
                weights[f"{stem}{index}.{option}.{kind}"] = value
    return _filled(model, weights)


def _encoder_weights(trunk: Any) -> dict[str, Tensor]:
    """Return the blocks' weights under the names of CLIP's and SigLIP's encoder."""
    weights: dict[str, Tensor] = {}
    for index, block in enumerate(trunk.blocks):
        at = f"encoder.layers.{index}."
        weights |= _split_qkv(at, block.attn.qkv.weight, block.attn.qkv.bias)
        weights |= _pair(f"{at}self_attn.out_proj", block.attn.proj)
        weights |= _pair(f"{at}layer_norm1", block.norm1) | _pair(f"{at}layer_norm2", block.norm2)
        weights |= _pair(f"{at}mlp.fc1", block.mlp.fc1) | _pair(f"{at}mlp.fc2", block.mlp.fc2)
    return weights


def _clip_config(
    convolution: Any, n_patches: int, mlp: int, layers: int, heads: int, activation: str, eps: float
) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=convolution.out_channels,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=_side(n_patches) * convolution.kernel_size[0],
        patch_size=convolution.kernel_size[0],
        hidden_act=activation,
        layer_norm_eps=eps,
    )


def _final_norm(trunk: Any) -> nn.Module:
    """Return the norm after the blocks; timm may keep it behind the pooling."""
    return trunk.norm if list(trunk.norm.parameters()) else trunk.fc_norm


def _side(n_patches: int) -> int:
    side = round(n_patches**0.5)
    _refuse({f"{n_patches} patches, which are no square": side * side != n_patches})
    return side


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    known = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
    name = type(module).__name__
    _refuse({f"activation {name}": name not in known})
    return known[name]


def _refuse(reasons: dict[str, bool]) -> None:
    found = [reason for reason, is_there in reasons.items() if is_there]
    if found:
        raise TowerError(f"the tower has {', '.join(found)}: no transformers class computes that")


def _pair(name: str, module: Any) -> dict[str, Tensor]:
    weights = {f"{name}.weight": module.weight}
    return weights if module.bias is None else {**weights, f"{name}.bias": module.bias}


def _split_qkv(at: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    names = [f"{at}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    weights = {f"{n}.weight": part for n, part in zip(names, weight.chunk(3), strict=True)}
    if bias is not None:
        weights |= {f"{n}.bias": part for n, part in zip(names, bias.chunk(3), strict=True)}
    return weights


def _filled(model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Load the weights; transformers releases differ in a ``vision_model.`` before every name."""
    own = [name for name in model.state_dict() if not name.endswith("position_ids")]
    prefix = "vision_model." if own[0].startswith("vision_model.") else ""
    named = {prefix + name: value.detach().float().clone() for name, value in weights.items()}
    if set(named) != set(own):
        differing = sorted(set(named) ^ set(own))
        raise TowerError(f"weights without a counterpart: {differing[:4]}")
    model.load_state_dict(named, strict=False)
    return model.eval()
