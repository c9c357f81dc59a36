"""Convert vision towers of open_clip to transformers classes with the same features.

A plain ViT of open_clip or timm is read into tensors with the same names for both libraries.
Plain means: patches through one convolution, at most one class token, one table of positions, and
blocks of norm, attention, norm and a two-layer MLP. Layer scale is folded into the matrices before
it.

With a class token and a norm before the blocks it becomes CLIP's tower; with a class token and no
such norm (CLIPA, EVA-01) a ViT; without a class token SigLIP's. Anything else is rejected with a
reason: rotary positions (EVA-02, PE), post-norm, ResNets, ConvNeXt.
"""

import pickle
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
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

from milora_vl.errors import MiloraError

_KINDS = {
    "open_clip.VisionTransformer": ("ResidualAttentionBlock", "MultiheadAttention"),
    "timm.VisionTransformer": ("Block", "Attention"),
    "timm.Eva": ("EvaBlock", "EvaAttention"),
}
_FOREIGN = {
    "q_norm": "norms of queries and keys",
    "k_norm": "norms of queries and keys",
    "reg_token": "register tokens",
    "fc1_g": "a gated MLP",
    "w12": "a gated MLP",
    "backbone": "convolutions before the patches",
}


class TowerError(MiloraError, ValueError):
    """A tower that no transformers class computes; the text says why."""


@dataclass(frozen=True)
class PlainViT:
    """Weights and shape of a plain ViT.

    Attributes:
        stem: ``patch.weight`` [D, 3, p, p], ``positions`` [1 + P, D] or [P, D], ``post_norm.*``; if
            there are such: ``patch.bias``, ``class`` [D], ``pre_norm.*``.
        layers: For each block ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, ``fc1``, ``fc2``,
            ``norm1`` and ``norm2``, each with ``.weight`` and ``.bias``.
        heads: Attention heads.
        activation: transformers' name of the MLP's activation.
        eps: Of all norms.
    """

    stem: dict[str, Tensor]
    layers: list[dict[str, Tensor]]
    heads: int
    activation: str
    eps: float

    @property
    def patch_px(self) -> int:
        """Side of a patch."""
        return self.stem["patch.weight"].shape[-1]

    @property
    def side_px(self) -> int:
        """Side of the images that the table of positions is for."""
        n_patches = len(self.stem["positions"]) - ("class" in self.stem)
        side = round(n_patches**0.5)
        refuse({f"{n_patches} patches, which are no square": side * side != n_patches})
        return side * self.patch_px


def read_plain_vit(visual: nn.Module) -> PlainViT:
    """Read ``model.visual`` of an open_clip model, or a timm ViT.

    Raises:
        TowerError: If it is no plain ViT; the message says why.
    """
    trunk: Any = getattr(visual, "trunk", visual)
    kind = f"{type(trunk).__module__.partition('.')[0]}.{type(trunk).__name__}"
    if kind not in _KINDS:
        raise TowerError(f"{kind} is no plain ViT: transformers' vision classes do not compute it")
    is_native = kind.startswith("open_clip")
    blocks = list(trunk.transformer.resblocks if is_native else trunk.blocks)
    first, (block_class, attention_class) = blocks[0], _KINDS[kind]
    found = (type(first).__name__, type(first.attn).__name__)
    refuse(
        {
            f"blocks of another kind ({', '.join(found)})": found != (block_class, attention_class),
            "rotary positions": getattr(trunk, "rope", None) is not None,
        }
    )
    stem, used = (_native_stem if is_native else _timm_stem)(trunk)
    layers = []
    for block in blocks:
        layer, parts = (_native_layer if is_native else _timm_layer)(block)
        layers.append(layer)
        used |= {id(part) for part in parts}
    _refuse_unread(trunk, used)  # an unread parameter would be lost without notice
    mlp = first.mlp
    norms = [m for m in (*blocks, getattr(trunk, "ln_pre", None), getattr(trunk, "norm_pre", None),
                         _final_norm(trunk)) if m is not None]  # fmt: skip
    eps = {m.eps for part in norms for m in part.modules() if isinstance(m, nn.LayerNorm)}
    refuse({f"norms with different epsilons {sorted(eps)}": len(eps) != 1})
    return PlainViT(
        stem,
        layers,
        heads=first.attn.num_heads,
        activation=_activation(mlp.gelu if is_native else mlp.act),
        eps=eps.pop(),
    )


def refuse(reasons: dict[str, bool]) -> None:
    """Raise a ``TowerError`` that names every reason which holds."""
    found = list(dict.fromkeys(reason for reason, is_there in reasons.items() if is_there))
    if found:
        raise TowerError(f"the tower has {', '.join(found)}: no transformers class computes that")


def _native_stem(trunk: Any) -> tuple[dict[str, Tensor], set[int]]:
    # behind an attention pool (CoCa) the last norm is of the pooled width, not of the tokens
    pooled = trunk.attn_pool is not None
    last = nn.LayerNorm(trunk.conv1.out_channels) if pooled else trunk.ln_post
    stem = {
        **_pair("patch", trunk.conv1),
        "class": trunk.class_embedding,
        "positions": trunk.positional_embedding,
        **(_pair("pre_norm", trunk.ln_pre) if isinstance(trunk.ln_pre, nn.LayerNorm) else {}),
        **_pair("post_norm", last),
    }
    return stem, {id(value) for value in stem.values()}


def _native_layer(block: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    attention, mlp = block.attn, block.mlp
    scales = [getattr(scale, "gamma", None) for scale in (block.ls_1, block.ls_2)]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    layer = {
        **_split(weight, bias),
        **_scaled("out_proj", attention.out_proj, scales[0]),
        **_pair("fc1", mlp.c_fc),
        **_scaled("fc2", mlp.c_proj, scales[1]),
        **_pair("norm1", block.ln_1),
        **_pair("norm2", block.ln_2),
    }
    modules = (attention.out_proj, mlp.c_fc, mlp.c_proj, block.ln_1, block.ln_2)
    return layer, [weight, bias, *scales, *(p for m in modules for p in m.parameters())]


def _timm_stem(trunk: Any) -> tuple[dict[str, Tensor], set[int]]:
    convolution = getattr(trunk.patch_embed, "proj", None)
    refuse({"convolutions before the patches": not isinstance(convolution, nn.Conv2d)})
    positions, token = trunk.pos_embed, trunk.cls_token
    refuse({"no table of positions": positions is None})
    used = {id(positions), id(token), *(id(p) for p in convolution.parameters())}
    positions = positions[0]
    if token is not None and getattr(trunk, "no_embed_class", False):
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    before = getattr(trunk, "norm_pre", None)
    stem = {
        **_pair("patch", convolution),
        "positions": positions,
        **({} if token is None else {"class": token.flatten()}),
        **(_pair("pre_norm", before) if isinstance(before, nn.LayerNorm) else {}),
        **_pair("post_norm", _final_norm(trunk)),
    }
    return stem, used | {id(value) for value in stem.values()}


def _timm_layer(block: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    attention, mlp = block.attn, block.mlp
    refuse({"a gated MLP": not (hasattr(mlp, "fc1") and hasattr(mlp, "act")) or hasattr(mlp, "gate")
            or mlp.fc2.in_features != mlp.fc1.out_features})  # fmt: skip
    bias = attention.qkv.bias
    parts: list[Any] = [attention.qkv.weight, bias]
    if getattr(attention, "q_bias", None) is not None:  # EVA: keys have none
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        parts += [attention.q_bias, attention.v_bias]
    scales = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
    for place, name in enumerate(("ls1", "ls2")):
        scales[place] = getattr(getattr(block, name, None), "gamma", scales[place])
    layer = {
        **_split(attention.qkv.weight, bias),
        **_scaled("out_proj", attention.proj, scales[0]),
        **_pair("fc1", mlp.fc1),
        **_scaled("fc2", mlp.fc2, scales[1]),
        **_pair("norm1", block.norm1),
        **_pair("norm2", block.norm2),
    }
    modules = (attention.proj, mlp.fc1, mlp.fc2, block.norm1, block.norm2)
    return layer, [*parts, *scales, *(p for m in modules for p in m.parameters())]


def _refuse_unread(trunk: nn.Module, used: set[int]) -> None:
    """Refuse parameters before or in the blocks that nothing above has read."""
    behind = ("attn_pool", "fc_norm", "norm.", "head", "ln_post", "proj", "mask_token")
    unread = [
        name
        for name, value in trunk.named_parameters()
        if id(value) not in used and not name.startswith(behind)
    ]
    reasons = {}
    for name in unread:
        known = next((why for part, why in _FOREIGN.items() if part in name.split(".")), None)
        reasons[known or f"weights that a plain ViT lacks ({name})"] = True
    refuse(dict(list(reasons.items())[:3]))


def _final_norm(trunk: Any) -> nn.Module | None:
    """Return the norm after the blocks; timm may keep it behind the pooling."""
    for name in ("ln_post", "norm", "fc_norm"):
        norm = getattr(trunk, name, None)
        if isinstance(norm, nn.LayerNorm):
            return norm
    return None


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    known = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
    name = type(module).__name__
    refuse({f"activation {name}": name not in known})
    return known[name]


def _pair(name: str, module: Any) -> dict[str, Tensor]:
    refuse({f"no {name}": module is None})
    weights = {f"{name}.weight": module.weight}
    return weights if module.bias is None else {**weights, f"{name}.bias": module.bias}


def _scaled(name: str, module: nn.Linear, scale: Tensor | None) -> dict[str, Tensor]:
    """Return a linear layer with the layer scale [D] behind it folded in."""
    pair = _pair(name, module)
    if scale is None:
        return pair
    return {key: (scale * value.movedim(0, -1)).movedim(-1, 0) for key, value in pair.items()}


def _split(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    names = ("q_proj", "k_proj", "v_proj")
    parts = {f"{n}.weight": part for n, part in zip(names, weight.chunk(3), strict=True)}
    if bias is not None:
        parts |= {f"{n}.bias": part for n, part in zip(names, bias.chunk(3), strict=True)}
    return parts


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
    """A vision tower and the images it was trained on.

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

    ``NAME=FILE`` is split into the model's name and the file of own weights.

    Raises:
        TowerError: If there is no such model, or no such weights of it; near names are listed.
    """
    import open_clip

    own_name, has_file, file = name.partition("=")
    architecture, _, tag = name.partition("/")
    if has_file:
        architecture, tag = own_name, file
    models = open_clip.list_models()
    if architecture not in models:
        near = get_close_matches(architecture, models, n=5, cutoff=0.4)
        raise TowerError(
            f"open_clip has no model {architecture!r}"
            + (f"; near: {', '.join(near)}" if near else "; see open_clip.list_models()")
        )
    if has_file:
        if not Path(file).is_file():
            raise TowerError(f"open_clip:{name}: there is no file {file}")
        return architecture, file
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

    ``NAME=FILE`` takes own weights of that architecture, as open_clip's training or
    ``torch.save(model.state_dict())`` writes them; nothing in the file is run. Their activation is
    that of the name (``ViT-B-16-quickgelu=FILE`` for QuickGELU). Published weights that were
    trained with QuickGELU (``openai`` and others) get it, whatever the model's name says.

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
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
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
