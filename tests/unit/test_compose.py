"""Laws of composing: any ViT and any causal language model become one plain LLaVA checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from chat_tokenizers import build_byte_level, build_llama_like
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from milora_vl.adapter.milora import attach_milora
from milora_vl.cli import main
from milora_vl.config import MiloraConfig, parse_config
from milora_vl.data.chat_template import derive_style
from milora_vl.data.prompts import PROMPT_STYLES
from milora_vl.eval.plain_generation import build_prompt, generate
from milora_vl.model.compose import (
    choose_template,
    compose_from_names,
    count_extra_tokens,
    load_tower,
    resize_tower,
)
from milora_vl.model.load import LoadError, load_vlm
from milora_vl.pipeline import prepare_base

SHAPE = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "initializer_range": 0.2,
}  # fmt: skip


def build_tower(kind: str):
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SHAPE)).eval()
    return SiglipVisionModel(SiglipVisionConfig(**SHAPE, vision_use_head=False)).eval()


@pytest.fixture(params=["clip", "siglip"])
def tower_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / request.param
    build_tower(request.param).save_pretrained(folder)
    classes = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}
    classes[request.param]().save_pretrained(folder)
    return folder


def write_language_model(folder: Path, kind: str, tied: bool) -> Path:
    tokenizer = build_byte_level() if kind == "byte_level" else build_llama_like(kind)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=tied, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "tied"), [("byte_level", True), ("llama_legacy", False)])
def test_named_parts_become_a_checkpoint_that_works(
    tower_folder: Path, kind: str, tied: bool, tmp_path: Path
) -> None:
    language = write_language_model(tmp_path / "language", kind, tied)
    out = tmp_path / "composed"
    words = ["compose", "--vision", f"hf:{tower_folder}", "--language", str(language)]
    assert main([*words, "--out", str(out), "--image-size", "42", "--feature-layer", "-1"]) == 0
    stock = AutoModelForImageTextToText.from_pretrained(out)
    assert stock.config.tie_word_embeddings == tied
    shares = stock.lm_head.weight.data_ptr() == stock.get_input_embeddings().weight.data_ptr()
    assert shares == tied
    vlm = load_vlm(out)
    assert vlm.tokens_per_image == 9
    assert vlm.prompt_style.name == "chatml"
    prompt = build_prompt(vlm, "What is it?", [Image.new("RGB", (50, 30), "red")])
    assert prompt["input_ids"].count(vlm.model.config.image_token_id) == 9
    assert prompt["pixel_values"].shape == (1, 3, 42, 42)
    assert generate(vlm, [prompt], 3)
    # the parts are the ones that were named
    expected = LlamaForCausalLM.from_pretrained(language)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        known = expected(ids).logits
        torch.testing.assert_close(vlm.model(ids).logits[..., : known.shape[-1]], known)
    _, certificate = attach_milora(vlm.model, MiloraConfig(r=4), progress=False)
    assert certificate.matched["projector"] == ["model.multi_modal_projector"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("side", [14, 42, 56])
def test_a_resized_tower_computes_what_transformers_interpolates(kind: str, side: int) -> None:
    tower = build_tower(kind)
    pixel_values = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tower(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        found = resize_tower(tower, side)(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert count_extra_tokens(resize_tower(tower, side), side) == (kind == "clip")


def test_a_tokenizer_without_chatml_gets_vicunas_prompt_with_its_own_end_token() -> None:
    words = ["<unk>", "<s>", "<end>", "a"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, "<unk>")),
        bos_token="<s>", eos_token="<end>", unk_token="<unk>",
    )  # fmt: skip
    tokenizer.chat_template = choose_template(tokenizer)
    style = derive_style(tokenizer)
    vicuna = PROMPT_STYLES["vicuna_v1"]
    assert style.system + style.system_suffix == vicuna.system + vicuna.system_suffix
    assert style.user_prefix == vicuna.user_prefix
    assert style.user_suffix + style.assistant_prefix == " ASSISTANT:"
    assert style.assistant_suffix == "<end>"
    assert style.bos


def test_stage_1_trains_the_projector_of_a_composed_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    build_tower("siglip").save_pretrained(tmp_path / "tower")
    SiglipImageProcessor().save_pretrained(tmp_path / "tower")
    language = write_language_model(tmp_path / "language", "byte_level", tied=True)
    base = compose_from_names(f"hf:{tmp_path / 'tower'}", str(language), tmp_path / "base")
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "a.png")
    caption = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "Blue."}]
    (tmp_path / "captions.json").write_text(
        json.dumps([{"image": "a.png", "conversations": caption}] * 4)
    )
    config = parse_config(
        {
            "model": {"path": str(base), "device": "cpu", "prompt_style": "chatml"},
            "data": {"train": str(tmp_path / "captions.json"), "image_folder": str(tmp_path)},
            "alignment": {
                "prompt_style": "plain",
                "training": {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"},
            },
        }
    )
    before = load_vlm(base).model.state_dict()
    aligned = load_vlm(prepare_base(config, tmp_path / "run")).model.state_dict()
    changed = {name for name, value in aligned.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_what_cannot_be_composed_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write open_clip:NAME/TAG or hf:ID_OR_FOLDER"):
        load_tower("ViT-B-16")
    with pytest.raises(ValueError, match="mlp2x_gelu alone"):
        compose_from_names("hf:x", "y", tmp_path / "out", projector="linear")
    with pytest.raises(LoadError, match="neither a folder here"):
        load_tower("hf:no-such-owner/no-such-tower")
    registers = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28,
            patch_size=14, num_register_tokens=4,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="5 tokens beside its patches"):
        count_extra_tokens(registers, 28)
    assert not (tmp_path / "out").exists()
