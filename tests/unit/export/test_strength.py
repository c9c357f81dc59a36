"""Laws of the strength: 0 is the base, 1 the trained model, and the update scales between."""

import json

import pytest
import torch
from family_models import build_checkpoint
from peft import PeftModel
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.cli import main
from milora_vl.config import MiloraConfig
from milora_vl.export.forms import export_adapter
from milora_vl.export.logits_check import check_batches, drawn_picture
from milora_vl.export.strength import Strength
from milora_vl.model.load import load_vlm

CLOSE = {"atol": 1e-4, "rtol": 0}


def picture_batch(vlm):
    place = (vlm.model.device, vlm.model.dtype)
    found = check_batches(vlm.processor, *place, drawn_picture(), "What is this?")
    return found["picture and text"]


def trained_adapter(checkpoint, folder, dtype="auto", **settings):
    """Save an adapter whose every trained tensor moved; return the batch and the live logits."""
    vlm = load_vlm(checkpoint, dtype=dtype)
    config = MiloraConfig(**{"r": 4, "residual": "anchor", **settings})
    model, _ = attach_milora(vlm.model, config, progress=False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, folder, base=vlm.path, processor=vlm.processor)
    return picture_batch(vlm), compute_logits(model, picture_batch(vlm))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "mllama"])
def test_both_ends_and_the_way_between(tmp_path, family):
    checkpoint = build_checkpoint(family, tmp_path / "base")
    batch, trained = trained_adapter(checkpoint, tmp_path / "adapter")
    base = load_vlm(checkpoint).model
    before = compute_logits(base, batch)
    assert (trained - before).abs().max() > 1e-2
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = load_adapter(base, tmp_path / "adapter", residual="anchor")
    dial = Strength(model)
    dial.set_(0.3)
    merged = export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged", strength=0.3)
    at_03 = load_vlm(merged.folder).model
    whole = export_adapter(tmp_path / "adapter", tmp_path / "whole", "merged")
    at_1 = load_vlm(whole.folder).model.state_dict()
    for key, value in at_03.state_dict().items():
        assert_close(value, weights[key].lerp(at_1[key], 0.3), **CLOSE)
    assert_close(compute_logits(model, batch), compute_logits(at_03, batch), **CLOSE)
    dial.set_(0)
    assert torch.equal(compute_logits(model, batch), before)
    dial.set_(1)
    assert torch.equal(compute_logits(model, batch), trained)


def test_export_scales_one_factor_and_says_so(tiny_checkpoint, tmp_path, capsys):
    batch, trained = trained_adapter(tiny_checkpoint, tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), "--out"]
    for strength in ("0", "0.7", "1"):
        assert main([*words, str(tmp_path / strength), "--strength", strength]) == 0
    assert ": ok" in capsys.readouterr().out
    logits = {
        strength: compute_logits(
            PeftModel.from_pretrained(load_vlm(tiny_checkpoint).model, tmp_path / strength), batch
        )
        for strength in ("0", "0.7", "1")
    }
    assert torch.equal(logits["0"], compute_logits(load_vlm(tiny_checkpoint).model, batch))
    assert_close(logits["1"], trained, **CLOSE)
    assert (logits["0.7"] - trained).abs().max() > 1e-3
    assert json.loads((tmp_path / "0.7" / "milora.json").read_text())["extra"] == {"strength": 0.7}
    assert "| Strength | 0.7 of what was trained |" in (tmp_path / "0.7" / "README.md").read_text()
    assert "Strength" not in (tmp_path / "1" / "README.md").read_text()


def test_bfloat16_with_the_anchor_is_the_base_at_strength_0(tiny_checkpoint, tmp_path):
    batch, trained = trained_adapter(tiny_checkpoint, tmp_path / "adapter", torch.bfloat16)
    base = load_vlm(tiny_checkpoint, dtype=torch.bfloat16).model
    before = compute_logits(base, batch)
    model = load_adapter(base, tmp_path / "adapter")
    dial = Strength(model)
    for strength, logits in ((0, before), (1, trained)):
        dial.set_(strength)
        assert float((compute_logits(model, batch) - logits).abs().max()) == 0.0


def test_what_has_no_strength_is_refused(tiny_checkpoint, tmp_path):
    trained_adapter(tiny_checkpoint, tmp_path / "dora", init="dora", residual="auto")
    with pytest.raises(ValueError, match="DoRA"):
        export_adapter(tmp_path / "dora", tmp_path / "out", "lora", strength=0.5)
    with pytest.raises(ValueError, match="finite"):
        export_adapter(tmp_path / "dora", tmp_path / "out", "lora", strength=float("nan"))
    model, _ = attach_milora(
        load_vlm(tiny_checkpoint).model, MiloraConfig(r=4, residual="subtract"), progress=False
    )
    with pytest.raises(ValueError, match="residual='anchor'"):
        Strength(model)
