"""Laws of the parts that are composed: what is taken, what is refused, and when."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from composed_parts import SHAPE, build_tower, write_language_model
from PIL import Image
from transformers import CLIPImageProcessor

from milora_vl.cli import main
from milora_vl.eval.generate_plain import build_prompt, generate
from milora_vl.model.compose import compose_from_names, load_tower
from milora_vl.model.load import LoadError, load_vlm
from milora_vl.model.open_clip import TowerError

TRANSFORMERS_TOWERS = {
    "dinov2": tf.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28,
        patch_size=14,
    ),
    "vit": tf.ViTConfig(**SHAPE),
    "clip": tf.CLIPConfig(
        vision_config=SHAPE,
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "vocab_size": 64},
    ),
    "siglip": tf.SiglipConfig(
        vision_config=SHAPE,
        text_config={"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "vocab_size": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMERS_TOWERS)
@pytest.mark.parametrize("side", [None, 42])
def test_vision_models_of_transformers_are_towers(
    kind: str, side: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tf.AutoModel.from_config(TRANSFORMERS_TOWERS[kind]).save_pretrained(tmp_path / "tower")
    CLIPImageProcessor().save_pretrained(tmp_path / "tower")
    language = write_language_model(tmp_path / "language", "byte_level", tied=False)
    vlm = load_vlm(
        compose_from_names(
            f"hf:{tmp_path / 'tower'}", str(language), tmp_path / "out", image_size_px=side
        )
    )
    assert vlm.tokens_per_image == (4 if side is None else 9)
    prompt = build_prompt(vlm, "What is it?", [Image.new("RGB", (50, 30), "red")])
    assert generate(vlm, [prompt], 2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.DeiTConfig(**SHAPE), "2 tokens beside its patches"),
        (tf.Dinov2WithRegistersConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28,
            patch_size=14, num_register_tokens=4), "5 tokens beside its patches"),
        (tf.Siglip2VisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                                num_attention_heads=2, num_patches=4, patch_size=14),
         "no ViT with one image and patch size"),
        (tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]), "no ViT with one image"),
    ],
    ids=["deit", "registers", "siglip2", "resnet"],
)  # fmt: skip
def test_other_vision_models_of_transformers_are_refused_with_the_reason(
    config: tf.PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    tf.AutoModel.from_config(config).save_pretrained(tmp_path / "tower")
    CLIPImageProcessor().save_pretrained(tmp_path / "tower")
    language = write_language_model(tmp_path / "language", "byte_level", tied=False)
    with pytest.raises(TowerError, match=reason):
        compose_from_names(f"hf:{tmp_path / 'tower'}", str(language), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slips_on_the_command_line_are_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def error_of(*words: str) -> str:
        assert main(["compose", *words]) == 1
        return capsys.readouterr().err

    language = str(write_language_model(tmp_path / "language", "byte_level", tied=False))
    build_tower("clip").save_pretrained(tmp_path / "tower")
    CLIPImageProcessor().save_pretrained(tmp_path / "tower")
    tower, out = f"hf:{tmp_path / 'tower'}", str(tmp_path / "out")
    known = ("--vision", tower, "--language", language)
    kept = tmp_path / "language" / "config.json"
    assert "exists already" in error_of(*known, "--out", language)
    assert kept.exists()
    assert "no multiple of the patch" in error_of(*known, "--out", out, "--image-size", "30")
    assert "hidden states 0 to 2, no -5" in error_of(*known, "--out", out, "--feature-layer", "-5")
    missing = ("--vision", tower, "--language", str(tmp_path / "nowhere"))
    assert "no such folder, and no hub id" in error_of(*missing, "--out", out)
    near = ("--vision", "open_clip:ViT-B16/openai", "--language", language)
    assert "near: " in error_of(*near, "--out", out)
    tagless = ("--vision", "open_clip:ViT-B-16", "--language", language)
    assert "write ViT-B-16/TAG" in error_of(*tagless, "--out", out)
    assert not (tmp_path / "out").exists()


def test_pickled_parts_need_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    language = write_language_model(tmp_path / "language", "byte_level", tied=False)
    tower = build_tower("clip")
    tower.save_pretrained(tmp_path / "tower")
    CLIPImageProcessor().save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "model.safetensors").unlink()
    torch.save(tower.state_dict(), tmp_path / "tower" / "pytorch_model.bin")
    words = ["compose", "--vision", f"hf:{tmp_path / 'tower'}", "--language", str(language)]
    words += ["--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert main([*words, "--allow-pickle", "--dtype", "bfloat16"]) == 0
    assert load_vlm(tmp_path / "out").model.dtype == torch.bfloat16


def test_an_interruption_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    language = write_language_model(tmp_path / "language", "byte_level", tied=False)
    build_tower("clip").save_pretrained(tmp_path / "tower")
    CLIPImageProcessor().save_pretrained(tmp_path / "tower")
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(tf.LlavaProcessor, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compose_from_names(f"hf:{tmp_path / 'tower'}", str(language), tmp_path / "made" / "out")
    assert not list((tmp_path / "made").iterdir())


def test_what_cannot_be_composed_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open_clip:NAME=FILE"):
        load_tower("ViT-B-16")
    with pytest.raises(ValueError, match="mlp2x_gelu alone"):
        compose_from_names("hf:x", "y", tmp_path / "out", projector="linear")
    with pytest.raises(LoadError, match="neither a folder here"):
        load_tower("hf:no-such-owner/no-such-tower")
    assert not (tmp_path / "out").exists()
