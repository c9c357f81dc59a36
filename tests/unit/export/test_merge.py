"""Laws of merging: merged = live = plain rank-2r adapter."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.config import MiloraConfig
from milora_vl.export.merge import merge_adapter

CLOSE = {"atol": 1e-4, "rtol": 0}


def trained(model, batch, **settings):
    config = MiloraConfig(**{"r": 6, "lora_alpha": 12, **settings})
    peft_model, _ = attach_milora(model, config, progress=False)
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    for _ in range(2):
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft_model


@pytest.mark.parametrize("residual", ["subtract", "anchor"])
def test_merged_is_live_is_plain(make_tiny_vlm, batch, tmp_path, residual):
    peft_model = trained(make_tiny_vlm(), batch, residual=residual)
    live = compute_logits(peft_model, batch)
    save_adapter(peft_model, tmp_path / "a")
    merged = merge_adapter(peft_model)
    assert_close(compute_logits(merged, batch), live, **CLOSE)
    plain = PeftModel.from_pretrained(make_tiny_vlm(), tmp_path / "a").merge_and_unload()
    for (name, got), (_, wanted) in zip(
        merged.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert_close(got, wanted, atol=1e-5, rtol=0, msg=name)


def test_merged_model_is_plain_transformers(make_tiny_vlm, batch, tmp_path):
    original = make_tiny_vlm()
    merged = merge_adapter(trained(make_tiny_vlm(), batch))
    assert type(merged) is type(original)
    assert list(merged.state_dict()) == list(original.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(compute_logits(reloaded, batch), compute_logits(merged, batch))
    moved = {
        name
        for name, value in merged.named_parameters()
        if not torch.equal(value, original.get_parameter(name))
    }
    assert not [name for name in moved if "vision_tower" in name or "lm_head" in name]
    assert len(moved) == 14 + 4


def test_low_precision_merge_rounds_once(make_tiny_vlm, batch):
    low = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    peft_model = trained(make_tiny_vlm().bfloat16(), low)
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = peft_model.get_base_model().get_submodule(name)
    wanted = layer.get_base_layer().weight.detach().double()
    for adapter in ("milora", "anchor"):
        factors = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
        wanted = wanted + layer.scaling[adapter] * factors
    merged = merge_adapter(peft_model).get_submodule(name).weight
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - wanted).abs().max() <= wanted.abs().max() * 2**-8


def test_untrained_anchor_merges_to_the_same_bits(make_tiny_vlm):
    original = make_tiny_vlm().bfloat16()
    config = MiloraConfig(r=6, residual="anchor")
    merged = merge_adapter(attach_milora(make_tiny_vlm().bfloat16(), config, progress=False)[0])
    assert all(
        torch.equal(value, original.state_dict()[name])
        for name, value in merged.state_dict().items()
    )


def test_merge_after_load_is_the_same(make_tiny_vlm, batch, tmp_path):
    peft_model = trained(make_tiny_vlm(), batch)
    live = compute_logits(peft_model, batch)
    save_adapter(peft_model, tmp_path / "a")
    merged = merge_adapter(load_adapter(make_tiny_vlm(), tmp_path / "a"))
    assert_close(compute_logits(merged, batch), live, **CLOSE)


def test_model_without_adapter_is_refused(tiny_vlm):
    with pytest.raises(ValueError, match="not made by attach_milora"):
        merge_adapter(tiny_vlm)
