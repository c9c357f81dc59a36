"""Laws of composing: any ViT and any causal language model become one plain LLaVA checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from composed_parts import build_tower, write_language_model
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.cli import main
from milora_vl.config import MiloraConfig, parse_config
from milora_vl.data.prompts import PROMPT_STYLES, derive_style, render_segments
from milora_vl.data.records import Turn
from milora_vl.eval.generate_plain import build_prompt, generate
from milora_vl.export.merge import merge_adapter
from milora_vl.model.compose import (
    choose_template,
    compose_from_names,
    count_extra_tokens,
    resize_tower,
)
from milora_vl.model.load import load_vlm
from milora_vl.model.open_clip import Tower, convert_open_clip_tower
from milora_vl.pipeline import run_pipeline


@pytest.fixture(params=["clip", "siglip"])
def tower_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / request.param
    build_tower(request.param).save_pretrained(folder)
    classes = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}
    classes[request.param]().save_pretrained(folder)
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
    turns = [Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "A fox.")]
    for case in (turns, turns[1:]):
        own, vicuna = (
            "".join(part.text for part in render_segments(case, one))
            for one in (style, PROMPT_STYLES["vicuna_v1"])
        )
        assert own == "<s>" + vicuna.replace("</s>", "<end>")


def test_both_stages_run_on_a_composed_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    build_tower("siglip").save_pretrained(tmp_path / "tower")
    SiglipImageProcessor().save_pretrained(tmp_path / "tower")
    language = write_language_model(tmp_path / "language", "byte_level", tied=True)
    base = compose_from_names(f"hf:{tmp_path / 'tower'}", str(language), tmp_path / "base")
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "a.png")
    caption = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "Blue."}]
    question = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Blue"}]
    for name, talk in {"captions": caption, "train": question}.items():
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"image": "a.png", "conversations": talk}] * 4)
        )
    stage = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    config = parse_config(
        {
            "model": {"path": str(base), "device": "cpu", "prompt_style": "chatml"},
            "data": {"train": str(tmp_path / "train.json"), "image_folder": str(tmp_path)},
            "alignment": {
                "train": [str(tmp_path / "captions.json")],
                "prompt_style": "plain",
                "training": stage,
            },
            "adapter": {"r": 4},
            "projector": {"learning_rate": 1e-3},
            "training": {**stage, "per_device_train_batch_size": 2},
        }
    )
    results = run_pipeline(config, tmp_path / "run")
    before = load_vlm(base).model.state_dict()
    aligned = load_vlm(results["base"])
    state = {name: value.clone() for name, value in aligned.model.state_dict().items()}
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    # stage 2 goes on from there: adapters on the language model, the projector once more
    peft_model = load_adapter(aligned.model, tmp_path / "run" / "adapter")
    merged = merge_adapter(peft_model).state_dict()
    moved = {name for name, value in merged.items() if not torch.equal(value, state[name])}
    assert {name for name in moved if "multi_modal_projector" in name} == changed
    rest = moved - changed
    assert rest
    assert all(name.startswith("model.language_model.layers.") for name in rest)


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_a_converted_open_clip_tower_becomes_a_llava_with_its_features(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    shape = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 3, "num_heads": 2}
    form = {
        "clip": {"pre_norm": True, "norm_layer": torch.nn.LayerNorm, "global_pool": "token"},
        "siglip": {"class_token": False, "global_pool": "map"},
        "vit": {"global_pool": "token", "init_values": 0.5},
    }[kind]
    torch.manual_seed(0)
    visual = timm.models.VisionTransformer(**shape, num_classes=0, **form).eval()
    tower = Tower(convert_open_clip_tower(visual), 28, [0.5] * 3, [0.25] * 3)
    monkeypatch.setattr("milora_vl.model.compose.load_open_clip_tower", lambda name: tower)
    language = write_language_model(tmp_path / "language", "byte_level", tied=True)
    name = "open_clip:ViT-B-16/laion2b_s34b_b88k"
    vlm = load_vlm(compose_from_names(name, str(language), tmp_path / "out"))
    assert vlm.tokens_per_image == 4
    pixel_values = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    caught = []
    visual.blocks[-2].register_forward_hook(lambda module, inputs, out: caught.append(out))
    with torch.no_grad():
        visual(pixel_values)
        features = caught[0][:, 0 if kind == "siglip" else 1 :]
        expected = vlm.model.model.multi_modal_projector(features)[0]
        found = vlm.model.model.get_image_features(pixel_values)
    found = getattr(found, "pooler_output", found)[0]
    torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-4, rtol=0)
