"""Laws of converted open_clip towers: the same features, in float32, from random weights."""

import pytest
import torch
from torch import nn

from milora_vl.model.open_clip_towers import (
    TowerError,
    convert_open_clip_tower,
    load_open_clip_tower,
)

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
SIDE, PATCH, WIDTH = 32, 8, 32
SHAPE = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 3, "num_heads": 2}


def open_clip_vit(quick: bool = False, **options) -> nn.Module:
    from open_clip.transformer import QuickGELU, VisionTransformer

    return VisionTransformer(
        image_size=SIDE, patch_size=PATCH, width=WIDTH, layers=3, heads=2, mlp_ratio=2.0,
        output_dim=16, act_layer=QuickGELU if quick else nn.GELU, **options,
    )  # fmt: skip


def timm_vit(**options) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**SHAPE, num_classes=0, **options)


TOWERS = {
    "clip": open_clip_vit,
    "clip-quickgelu": lambda: open_clip_vit(quick=True),
    "coca": lambda: open_clip_vit(attentional_pool=True),
    "timm-clip": lambda: timm_vit(pre_norm=True, norm_layer=nn.LayerNorm, global_pool="token"),
    "timm-siglip": lambda: timm_vit(
        class_token=False, global_pool="map", act_layer=lambda: nn.GELU(approximate="tanh")
    ),
    "timm-vit": lambda: timm_vit(global_pool="avg", fc_norm=False),
}


def shake_(module: nn.Module) -> nn.Module:
    """Give every parameter a random value, so that none is left out unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def block_outputs(visual: nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The original's tokens after each block, caught on the way."""
    caught: list[torch.Tensor] = []
    blocks = visual.blocks if hasattr(visual, "blocks") else visual.transformer.resblocks
    hooks = [block.register_forward_hook(lambda m, i, out: caught.append(out)) for block in blocks]
    visual(pixel_values)
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize("kind", TOWERS)
def test_features_of_every_layer_are_the_originals(kind: str) -> None:
    visual = shake_(TOWERS[kind]())
    tower = convert_open_clip_tower(visual)
    pixel_values = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block_outputs(visual, pixel_values)
        found = tower(pixel_values, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected) + 1
    for ours, theirs in zip(found.hidden_states[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    has_class = found.hidden_states[0].shape[1] - (SIDE // PATCH) ** 2
    assert has_class == (kind != "timm-siglip")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: open_clip_vit(ls_init_value=0.1), "layer scale"),
        (lambda: open_clip_vit(no_ln_pre=True), "no norm before the blocks"),
        (lambda: timm_vit(init_values=0.1), "layer scale"),
        (lambda: timm_vit(reg_tokens=4), "register tokens"),
        (lambda: timm_vit(qk_norm=True), "norms of queries"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "no plain ViT"),
    ],
)
def test_what_cannot_be_expressed_says_so(build, reason: str) -> None:
    with pytest.raises(TowerError, match=reason):
        convert_open_clip_tower(build())


def test_unknown_names_and_tags_are_told() -> None:
    with pytest.raises(TowerError, match="no model 'ViT-Z-1'"):
        load_open_clip_tower("ViT-Z-1/openai")
    with pytest.raises(TowerError, match=r"no weights 'nothing' of ViT-B-16;.*openai"):
        load_open_clip_tower("ViT-B-16/nothing")
