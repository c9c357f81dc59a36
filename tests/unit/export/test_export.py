"""Laws of exports: they load the stock way and compute what the live model does, or are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from adapters_to_export import CLOSE, example, make_adapter
from chat_tokenizers import build_byte_level
from peft import PeftModel
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from milora_vl.adapter.attach import compute_logits
from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.cli import main
from milora_vl.export import forms as export_file
from milora_vl.export.forms import ExportError, export_adapter
from milora_vl.export.logits_check import check_batches, drawn_picture
from milora_vl.model.compose import compose_llava
from milora_vl.model.load import load_vlm


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    return make_adapter(tiny_checkpoint, tmp_path_factory.mktemp("runs") / "run")


def stock_logits(checkpoint, folder):
    vlm = load_vlm(checkpoint)
    return compute_logits(PeftModel.from_pretrained(vlm.model, folder), example(vlm))


def test_plain_lora_of_twice_the_rank(run, tiny_checkpoint, tmp_path, capsys):
    folder, live = run
    out = tmp_path / "lora"
    assert main(["export", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "picture and text: logits of text differ by at most" in printed
    assert printed.count(": ok") == 2
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert_close(stock_logits(tiny_checkpoint, out), live, **CLOSE)
    vlm = load_vlm(tiny_checkpoint)
    assert_close(compute_logits(load_adapter(vlm.model, out), example(vlm)), live, **CLOSE)


@pytest.mark.parametrize("rank", [8, 3])
def test_recompressed_lora_says_what_it_lost(run, tiny_checkpoint, tmp_path, capsys, rank):
    folder, live = run
    out = tmp_path / "small"
    words = ["export", str(folder), "--out", str(out), "--form", "lora-small"]
    assert main([*words, "--rank", str(rank)]) == 0
    assert f"rank 8 -> {rank}: the cut leaves out" in capsys.readouterr().out
    report = json.loads((out / "truncation.json").read_text())
    assert len(report["layers"]) == 14
    assert json.loads((out / "adapter_config.json").read_text())["r"] == rank
    difference = (stock_logits(tiny_checkpoint, out) - live).abs().max()
    if rank == 8:
        assert report["error_ratio"] < 1e-6
        assert difference < 1e-4
    else:
        assert 1e-4 < report["error_ratio"] < 1
        assert difference > 1e-4
    vlm = load_vlm(tiny_checkpoint)  # the same checks of base and files as for any other
    loaded = compute_logits(load_adapter(vlm.model, out), example(vlm))
    assert_close(loaded, stock_logits(tiny_checkpoint, out), **CLOSE)


def test_merged_is_a_stock_checkpoint_with_its_processor(run, tmp_path):
    folder, live = run
    exported = export_adapter(folder, tmp_path / "merged", "merged")
    assert all(check.passed and check.tolerance for check in exported.checks)
    model = AutoModelForImageTextToText.from_pretrained(exported.folder).eval()
    processor = AutoProcessor.from_pretrained(exported.folder)
    batches = check_batches(processor, model.device, model.dtype, drawn_picture(), "What is this?")
    assert_close(compute_logits(model, batches["picture and text"]), live, **CLOSE)
    again = export_adapter(folder, tmp_path / "merged", "merged")  # an export may be replaced
    assert again.folder == exported.folder


@pytest.mark.parametrize("init", ["lora", "rslora", "dora", "olora"])
def test_other_methods_export_alike(tiny_checkpoint, tmp_path, init):
    folder, live = make_adapter(tiny_checkpoint, tmp_path / "run", init=init)
    for form in ("lora", "merged"):
        exported = export_adapter(folder, tmp_path / form, form)
        assert all(check.passed for check in exported.checks)
    assert_close(stock_logits(tiny_checkpoint, tmp_path / "lora"), live, **CLOSE)
    if init != "dora":
        export_adapter(folder, tmp_path / "small", "lora-small", r=2)
    else:
        with pytest.raises(ValueError, match="DoRA"):
            export_adapter(folder, tmp_path / "small", "lora-small", r=2)


def test_the_card_loads_what_it_says(run, tmp_path):
    folder, live = run
    out = export_adapter(folder, tmp_path / "lora", "lora").folder
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft"
    assert head["pipeline_tag"] == "image-text-to-text"
    assert "license" not in head
    for wanted in (
        "init=milora slice=minor",
        "| r, lora_alpha | 8, 16 (trained with 4, 8) |",
        "ok",
    ):
        assert wanted in card
    base = json.loads((out / "milora.json").read_text())["base"]["name_or_path"]
    assert base not in card  # a path of this machine says nothing to others
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) == 5
    code = code.replace("path/to/this/folder", str(out)).replace(repr(Path(base).name), repr(base))
    found = {}
    exec(code, found)  # the reader's own five lines
    vlm = load_vlm(base)
    assert_close(compute_logits(found["model"], example(vlm)), live, **CLOSE)
    merged = export_adapter(folder, tmp_path / "merged", "merged").folder
    head = yaml.safe_load((merged / "README.md").read_text().split("---")[1])
    assert head["library_name"] == "transformers"


def test_an_export_that_computes_something_else_is_not_put_in_place(
    run, tmp_path, monkeypatch, capsys
):
    folder, _ = run

    def spoiled(peft_model):
        tensors = portable(peft_model)
        key = next(key for key in tensors if key.endswith("lora_B.weight"))
        tensors[key] = tensors[key] + 0.5
        return tensors

    portable = export_file.portable_tensors
    monkeypatch.setattr(export_file, "portable_tensors", spoiled)
    with pytest.raises(ExportError, match="does not compute what the live model computes"):
        export_adapter(folder, tmp_path / "out", "lora")
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "FAILED" in capsys.readouterr().err


def test_wrong_words_are_refused(run, tiny_checkpoint, tmp_path, capsys):
    folder, _ = run
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    for words, message in (
        ([str(tmp_path), "--out", str(tmp_path / "o")], "neither an adapter folder"),
        ([str(folder), "--out", str(full)], "holds other files"),
        (
            [str(folder), "--out", str(tmp_path / "o"), "--rank", "3"],
            "belongs to --form lora-small",
        ),
        (
            [str(folder), "--out", str(tmp_path / "o"), "--form", "lora-small", "--rank", "9"],
            "this adapter has rank 8",
        ),
        (
            [str(folder), "--out", "o", "--form", "merged", "--merge-onto", "dequantized"],
            "4-bit base",
        ),
    ):
        assert main(["export", *words]) == 1
        assert message in capsys.readouterr().err
    assert (full / "thesis.txt").read_text() == "years of work"


def test_the_check_uses_the_runs_own_picture(run, tmp_path, monkeypatch):
    folder, _ = run
    Image.new("RGB", (40, 30), (9, 90, 200)).save(tmp_path / "one.png")
    turns = [
        {"from": "human", "value": "<image>\nWhich colour is it?"},
        {"from": "gpt", "value": "Blue."},
    ]
    records = [{"id": "1", "image": "one.png", "conversations": turns}]
    (tmp_path / "val.json").write_text(json.dumps(records))
    config = {
        "model": {"path": "x", "prompt_style": "chatml"},
        "data": {
            "train": str(tmp_path / "val.json"),
            "validation": str(tmp_path / "val.json"),
            "image_folder": str(tmp_path),
        },
    }
    found = export_file.example_of_run(folder / "adapter")
    assert found is None  # the run's config names no data
    monkeypatch.setattr("milora_vl.export.source.load_config", lambda _: parse(config))
    picture, question = export_file.example_of_run(folder / "adapter")
    assert picture.size == (40, 30)
    assert question == "Which colour is it?"


def parse(values):
    from milora_vl.config import parse_config

    return parse_config(values)


@pytest.fixture(scope="module")
def even_checkpoint(tmp_path_factory):
    """A composed checkpoint whose sides are multiples of 32, as the 4-bit CPU kernels need."""
    tokenizer = build_byte_level()
    torch.manual_seed(2)
    sides = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = Dinov2Model(Dinov2Config(mlp_ratio=2, image_size=28, patch_size=14, **sides))
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), intermediate_size=128, num_key_value_heads=2,
            initializer_range=0.2, tie_word_embeddings=True, **{**sides, "hidden_size": 64},
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    return compose_llava(
        tower,
        language_model,
        tokenizer,
        tmp_path_factory.mktemp("even") / "checkpoint",
        image_size_px=28,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.2, 0.2],
        vision_feature_layer=-1,
    )


def test_4_bit_adapters_merge_onto_a_named_base(even_checkpoint, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    folder, live = make_adapter(even_checkpoint, tmp_path / "run", quantization="nf4")
    facts = json.loads((folder / "adapter" / "milora.json").read_text())
    assert facts["base"]["quantized"] == "Params4bit"
    with pytest.raises(ValueError, match="--merge-onto original or"):
        export_adapter(folder, tmp_path / "merged", "merged")
    export_adapter(folder, tmp_path / "lora", "lora")  # on the 4-bit base again
    found = {}
    for onto in ("original", "dequantized"):
        exported = export_adapter(folder, tmp_path / onto, "merged", merge_onto=onto)
        assert all(check.passed for check in exported.checks)
        vlm = load_vlm(tmp_path / onto)
        found[onto] = compute_logits(vlm.model, example(vlm))
        card = (tmp_path / onto / "README.md").read_text()
        assert f"**{onto}**" in card
        assert ("against the 4-bit model" in card) == (onto == "original")
    distance = {onto: float((logits - live).abs().max()) for onto, logits in found.items()}
    assert distance["dequantized"] < distance["original"]
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "differ from these by the quantization error" in capsys.readouterr().out
