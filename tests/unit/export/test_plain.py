"""Laws of exporting adapters of others: what the live model computes, or a refusal by name."""

import json

import pytest
import torch
from eval_models import build_vlm
from peft import (
    BOFTConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from milora_vl.adapter.attach import compute_logits
from milora_vl.adapter.tuned import load_tuned
from milora_vl.cli import main
from milora_vl.export.forms import export_adapter
from milora_vl.export.logits_check import check_batches, drawn_picture
from milora_vl.model.load import load_vlm

TARGETS = r"model\.language_model\..*\.(q_proj|o_proj)"
TEXT = "What is this?"
CLOSE = {"atol": 1e-4, "rtol": 0}


def example(vlm):
    batches = check_batches(vlm.processor, vlm.model.device, vlm.model.dtype, drawn_picture(), TEXT)
    return batches["picture and text"]


def save_foreign(checkpoint, folder, config, scale=0.3, rename=lambda key: key):
    """Save a perturbed PEFT adapter; return the logits of the model that carries it."""
    torch.manual_seed(0)
    vlm = load_vlm(checkpoint)
    peft_model = get_peft_model(vlm.model, config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * scale)
    live = compute_logits(peft_model.eval(), example(vlm))
    peft_model.save_pretrained(folder)
    return live


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})


PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"o_proj": 32}}
LORAS = {
    "patterns": lora(**PATTERNS, use_rslora=True),
    "dora": lora(use_dora=True),
    "saved": lora(modules_to_save=["multi_modal_projector", "lm_head"], bias="all"),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"], exclude_modules=".*vision.*"),
    "pissa": lora(init_lora_weights="pissa"),
}


@pytest.fixture(scope="module")
def untied_checkpoint(tmp_path_factory):
    """A model whose input and output embeddings are two tables."""
    vlm, folder = build_vlm(), tmp_path_factory.mktemp("untied")
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", LORAS)
def test_a_lora_of_others_exports_in_every_form_that_is_exact(untied_checkpoint, tmp_path, case):
    live = save_foreign(untied_checkpoint, tmp_path / "adapter", LORAS[case])
    for form in ("lora", "lora-small", "merged"):
        out = tmp_path / form
        if form == "lora-small" and case in ("dora", "embedding", "pissa"):
            with pytest.raises(ValueError, match=r"--form lora"):
                export_adapter(tmp_path / "adapter", out, form)
            assert not out.exists()
            continue
        exported = export_adapter(tmp_path / "adapter", out, form)
        assert all(check.passed for check in exported.checks)
        vlm = load_vlm(untied_checkpoint)
        if form == "merged":
            model = AutoModelForImageTextToText.from_pretrained(out).eval()
        else:
            model = PeftModel.from_pretrained(vlm.model, out)
        assert_close(compute_logits(model, example(vlm)), live, **CLOSE)
        card = (out / "README.md").read_text()
        assert "LORA" in card
        assert "ok" in card or form == "lora-small"


def test_embeddings_that_are_tied_are_not_merged(tiny_checkpoint, tmp_path):
    save_foreign(tiny_checkpoint, tmp_path / "adapter", LORAS["embedding"])
    with pytest.raises(ValueError, match=r"ties to its other one.*--form lora"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")


def test_the_command_renames_recompresses_and_says_what_it_cut(tiny_checkpoint, tmp_path, capsys):
    live = save_foreign(tiny_checkpoint, tmp_path / "adapter", lora())
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj"]}))
    words = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    assert main([*words, "--form", "lora-small", "--rank", "2"]) == 0
    assert "rank 4 -> 2: the cut leaves out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "truncation.json").read_text())["error_ratio"] > 0
    shapes = {len(v) for k, v in load_file(tmp_path / "out/adapter_model.safetensors").items()
              if "lora_A" in k}  # fmt: skip
    assert shapes == {2}
    vlm = load_tuned(None, tmp_path / "out", device="cpu")
    assert not torch.equal(compute_logits(vlm.model, example(vlm)), live)
    assert main([*words, "--form", "lora-small", "--rank", "5"]) == 1
    assert "this adapter has rank 4" in capsys.readouterr().err
    assert main([*words, "--strength", "0.5"]) == 1
    assert "need an adapter of this package" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        BOFTConfig(boft_block_size=4, target_modules=TARGETS),
        IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        LNTuningConfig(target_modules=r"model\.language_model\..*layernorm"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_kinds_are_merged_by_peft_and_are_no_lora(tiny_checkpoint, tmp_path, config):
    live = save_foreign(tiny_checkpoint, tmp_path / "adapter", config)
    export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    vlm = load_vlm(tmp_path / "out")
    assert_close(compute_logits(vlm.model, example(vlm)), live, **CLOSE)
    with pytest.raises(ValueError, match=r"not LORA: --form merged"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LilyConfig(target_modules=TARGETS), "LILY cannot be used here.*whole batch"),
        (lora(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
        (lora(lora_bias=True), "lora_bias"),
        (OSFConfig(target_modules=TARGETS, effective_rank=4), "PEFT cannot merge OSF"),
    ],
)
def test_what_cannot_be_merged_or_run_is_refused_by_name(tiny_checkpoint, tmp_path, config, words):
    get_peft_model(load_vlm(tiny_checkpoint).model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=words):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_overflows_is_refused(tiny_checkpoint, tmp_path):
    save_foreign(tiny_checkpoint, tmp_path / "adapter", lora(), scale=900.0)
    with pytest.raises(ValueError, match=r"not finite in float16"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
