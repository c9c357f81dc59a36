"""Laws of converted open_clip towers: the same features, in float32, from random weights."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

from milora_vl.model.open_clip import (
    TowerError,
    check_open_clip_name,
    convert_open_clip_tower,
    load_open_clip_tower,
)

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
SIDE, PATCH, WIDTH = 32, 8, 32
SHAPE = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 3, "num_heads": 2}
SIZE = re.compile(r"_(tiny|small|base|x*large2?|gigantic)(?=_|$)|_\d+$|\d$")
TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}

CONVERTED = {  # every architecture that is not here is refused
    "CLIPVisionModel": r"ViT-(B|L|M|S|H|e|g|bigG)-\d\d(-.*)?|coca_.*|MobileCLIP2-L-14|"
    r"(mt5|nllb-clip|roberta|xlm-roberta)-.*",
    "ViTModel": r"EVA01-g-14(-plus)?|ViT-\w+-14-CLIPA(-336)?",
    "SiglipVisionModel": r".*-SigLIP2?(-.*)?|nllb-clip-\w+-siglip|vit_medium_patch16_gap_256",
}


def kinds_of_towers() -> dict[str, tuple[str, dict[str, Any], bool]]:
    """One architecture of every kind of tower: name -> (name, vision settings, quick GELU)."""
    sizes = ("layers", "width", "image_size", "head_width", "patch_size", "mlp_ratio")
    kinds: dict[str, tuple[str, dict[str, Any], bool]] = {}
    for name in open_clip.list_models():
        settings = open_clip.get_model_config(name)
        vision, quick = settings["vision_cfg"], settings.get("quick_gelu", False)
        kind = {key: value for key, value in vision.items() if key not in sizes}
        kind["timm_model_name"] = SIZE.sub("", vision.get("timm_model_name", ""))
        kind["is_resnet"] = isinstance(vision.get("layers"), list)
        kinds.setdefault(json.dumps([kind, quick], sort_keys=True), (name, vision, quick))
    return {name: (name, vision, quick) for name, vision, quick in kinds.values()}


def build_small(vision: dict[str, Any], quick: bool) -> nn.Module:
    """The tower of an architecture, narrow and shallow; others than ViTs without values."""
    timm_name = vision.get("timm_model_name")
    if timm_name is None:
        if isinstance(vision["layers"], list):
            small = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
        else:
            side = 4 * vision["patch_size"]
            small = {"layers": 2, "width": 64, "head_width": 32, "image_size": side}
        if vision.get("attentional_pool"):
            small["attn_pooler_heads"] = 2
        return open_clip.CLIP(64, {**vision, **small}, TEXT, quick_gelu=quick).visual
    pool = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool") else {}
    if not re.match(r"(vit|eva)(?!\w*mci)(?!amin)", timm_name):
        with torch.device("meta"):
            return timm.create_model(timm_name, num_classes=0, **pool)
    side = 4 * int(re.search(r"patch(\d+)", timm_name)[1])
    small = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": side}
    return timm.create_model(timm_name, num_classes=0, **pool, **small)


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


def assert_same_features(visual: nn.Module) -> Any:
    visual = shake_(visual)
    tower = convert_open_clip_tower(visual)
    side = tower.config.image_size
    pixel_values = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block_outputs(visual, pixel_values)
        found = tower(pixel_values, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected) + 1
    for ours, theirs in zip(found.hidden_states[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    return tower


KINDS = kinds_of_towers()


@pytest.mark.parametrize("name", KINDS)
def test_every_architecture_of_open_clip_is_converted_or_refused(name: str) -> None:
    architecture, vision, quick = KINDS[name]
    expected = next(
        (kind for kind in reversed(CONVERTED) if re.fullmatch(CONVERTED[kind], architecture)), None
    )
    visual = build_small(vision, quick)
    if expected is None:
        with pytest.raises(TowerError, match=r"no transformers class|is no plain ViT"):
            convert_open_clip_tower(visual)
        return
    tower = assert_same_features(visual)
    assert type(tower).__name__ == expected
    # LLaVA builds its tower from the configuration by this class
    again = AutoModel.from_config(tower.config)
    assert set(again.state_dict()) == set(tower.state_dict())
    if quick:
        assert tower.config.hidden_act == "quick_gelu"


def open_clip_vit(**options) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=SIDE, patch_size=PATCH, width=WIDTH, layers=3, heads=2, mlp_ratio=2.0,
        output_dim=16, **options,
    )  # fmt: skip


def timm_vit(**options) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**SHAPE, num_classes=0, **options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: open_clip_vit(ls_init_value=0.5),
        lambda: open_clip_vit(no_ln_pre=True, ls_init_value=0.5),
        lambda: open_clip_vit(pos_embed_type="sin_cos_2d"),
        lambda: open_clip_vit(norm_layer=lambda width: nn.LayerNorm(width, eps=1e-3)),
        lambda: timm_vit(pre_norm=True, norm_layer=nn.LayerNorm, global_pool="token"),
        lambda: timm_vit(init_values=0.5),
        lambda: timm_vit(no_embed_class=True),
        lambda: timm_vit(qkv_bias=False, class_token=False, global_pool="avg"),
        lambda: timm_vit(global_pool="avg", fc_norm=False),
    ],
)
def test_other_forms_of_plain_vits_are_converted(build) -> None:
    assert_same_features(build())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: open_clip_vit(scaled_cosine_attn=True), "blocks of another kind"),
        (lambda: timm_vit(reg_tokens=4), "register tokens"),
        (lambda: timm_vit(qk_norm=True), "norms of queries"),
        (lambda: timm_vit(pre_norm=True, class_token=False, global_pool="avg"), "no class token"),
        (lambda: timm_vit(pos_embed="none"), "no table of positions"),
        (lambda: timm_vit(act_layer=nn.SiLU), "activation SiLU"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "no plain ViT"),
    ],
)
def test_what_cannot_be_expressed_says_so(build, reason: str) -> None:
    with pytest.raises(TowerError, match=reason):
        convert_open_clip_tower(build())


def test_unknown_names_and_tags_are_told_with_near_ones_before_anything_is_fetched() -> None:
    with pytest.raises(TowerError, match=r"no model 'ViT-B16'; near: .*ViT-B-16"):
        load_open_clip_tower("ViT-B16/openai")
    with pytest.raises(TowerError, match=r"no weights 'nothing' of ViT-B-16;.*openai"):
        load_open_clip_tower("ViT-B-16/nothing")
    with pytest.raises(TowerError, match=r"nearest: laion2b_s34b_b88k"):
        check_open_clip_name("ViT-B-16/laion2b_s34b_b79k")
    with pytest.raises(TowerError, match=r"exists for ViT-B-16-SigLIP"):
        check_open_clip_name("ViT-B-16/webli")
    with pytest.raises(TowerError, match="no weights '' of ViT-B-16"):
        check_open_clip_name("ViT-B-16")
    assert check_open_clip_name("ViT-B-16/laion2b_s34b_b88k") == ("ViT-B-16", "laion2b_s34b_b88k")


def test_weights_of_quick_gelu_get_it_whatever_the_model_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {}

    def create(name: str, **options: Any) -> nn.Module:
        """What open_clip makes, without fetching: its own class from its own settings."""
        asked.update(options)
        settings = open_clip.get_model_config(name)
        model = open_clip.CLIP(
            64,
            {**settings["vision_cfg"], "layers": 2, "width": 64, "image_size": 64},
            TEXT,
            quick_gelu=options["force_quick_gelu"],
        )
        model.visual.image_mean, model.visual.image_std = (0.5,) * 3, (0.25,) * 3
        return model

    monkeypatch.setattr(open_clip, "create_model", create)
    tower = load_open_clip_tower("ViT-B-16/openai")
    assert asked["pretrained"] == "openai"
    assert tower.model.config.hidden_act == "quick_gelu"
    assert (tower.image_size_px, tower.image_mean) == (64, [0.5, 0.5, 0.5])
    assert load_open_clip_tower("ViT-B-16/laion2b_s34b_b88k").model.config.hidden_act == "gelu"


def test_own_weights_come_from_a_file(tmp_path: Path) -> None:
    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    settings = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT}
    (tmp_path / "tiny-of-the-tests.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path)
    model = shake_(open_clip.create_model("tiny-of-the-tests"))
    torch.save(model.state_dict(), tmp_path / "own.pt")
    tower = load_open_clip_tower(f"tiny-of-the-tests={tmp_path / 'own.pt'}")
    state = tower.model.state_dict()
    (patches,) = (value for name, value in state.items() if "patch_embedding.weight" in name)
    assert torch.equal(patches, model.visual.conv1.weight)
    assert tower.image_size_px == 64
    with pytest.raises(TowerError, match="there is no file"):
        check_open_clip_name("tiny-of-the-tests=nowhere.pt")
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"code": Path}))  # not tensors
    with pytest.raises(TowerError, match="the weights cannot be loaded"):
        load_open_clip_tower(f"tiny-of-the-tests={tmp_path / 'bad.pt'}")
