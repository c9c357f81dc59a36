"""Laws of master weights: same output, small steps kept, plain names in files."""

import copy

import pytest
import torch
from torch import nn

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.state import (
    keep_master_weights_,
    load_trained_state_,
    remove_master_weights_,
    trained_projector,
    trained_state,
)
from milora_vl.config import MiloraConfig
from milora_vl.export.merge import merge_adapter

PROJECTOR = "model.multi_modal_projector"


def mlp(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_and_plain_state_stay(dtype):
    module, x = mlp(dtype), torch.randn(3, 8).to(dtype)
    before, names = module(x), list(module.state_dict())
    keep_master_weights_(module)
    assert torch.equal(module(x), before)
    assert list(trained_state(module)) == names
    assert all(value.dtype == torch.float32 for value in trained_state(module).values())
    remove_master_weights_(module)
    assert torch.equal(module(x), before)
    assert list(module.state_dict()) == names
    assert all(value.dtype == dtype for value in module.state_dict().values())


def test_steps_too_small_for_bfloat16_add_up():
    plain, kept = mlp(torch.bfloat16), mlp(torch.bfloat16)
    keep_master_weights_(kept)
    before = copy.deepcopy(plain[0].weight.data)
    for module in (plain, kept):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-5)
        for _ in range(100):
            optimizer.zero_grad()
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    large = before.abs() > 0.1  # a step of 1e-5 is below their bfloat16 spacing of 5e-4 or more
    assert torch.equal(plain[0].weight.data[large], before[large])
    moved = trained_state(kept)["0.weight"] - before.float()
    assert torch.allclose(moved, torch.full_like(moved, -1e-3), atol=1e-5)


def test_gradients_reach_the_masters_in_float32():
    module = mlp(torch.bfloat16)
    keep_master_weights_(module)
    module(torch.randn(3, 8).bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_state_round_trip():
    first, second = mlp(torch.bfloat16), mlp(torch.bfloat16)
    keep_master_weights_(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter += 1e-4
    state = trained_state(first)
    keep_master_weights_(second)
    load_trained_state_(second, state)
    assert all(torch.equal(v, state[k]) for k, v in trained_state(second).items())


def test_bfloat16_model_trains_saves_loads_and_merges_its_projector(make_tiny_vlm, batch, tmp_path):
    low = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    base = make_tiny_vlm().bfloat16()
    peft_model, certificate = attach_milora(base, MiloraConfig(r=6), low, progress=False)
    assert certificate.step0_max_abs_logit_difference == 0.0
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    optimizer = torch.optim.SGD(trainable, lr=1e-4)
    for _ in range(3):
        peft_model(**low).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = trained_state(trained_projector(peft_model, PROJECTOR))
    save_adapter(peft_model, tmp_path / "a")
    loaded = load_adapter(make_tiny_vlm().bfloat16(), tmp_path / "a", trainable=True)
    restored = trained_state(trained_projector(loaded, PROJECTOR))
    assert all(torch.equal(value, restored[name]) for name, value in saved.items())
    live = compute_logits(peft_model, low)
    assert torch.equal(compute_logits(loaded, low), live)
    names = list(make_tiny_vlm().state_dict())
    merged = merge_adapter(peft_model)
    assert list(merged.state_dict()) == names
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_mixed_precision_runs_on_the_masters(make_tiny_vlm, batch):
    low = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    peft_model, _ = attach_milora(make_tiny_vlm().bfloat16(), MiloraConfig(r=6), progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        peft_model(**low).loss.backward()
    projector = trained_projector(peft_model, PROJECTOR)
    assert all(p.grad.abs().max() > 0 for p in projector.parameters())
