"""Laws of fused layers: each projection in its own slice, exact from start to merge."""

import copy
from pathlib import Path

import pytest
import torch
from fused_models import FUSED, SLOW, build, logits, train
from peft import PeftModel
from torch import nn

from milora_vl import MiloraConfig, attach_milora, load_adapter, merge_adapter, save_adapter
from milora_vl.adapter.checkpoint import check_files, read_milora_file
from milora_vl.adapter.fused import Rows
from milora_vl.adapter.state import ANCHOR, MILORA, factors
from milora_vl.adapter.targets import find_targets


@pytest.mark.parametrize("name", ["phi3", "persimmon", "qwen3_5", "qwen3_next"])
def test_a_block_without_values_silences_those_it_works_with(name):
    """Their product is 0 if one of them is, which tells the rows of each from outside."""
    model = build(name)
    rows = {k: v for k, v in find_targets(model, "all-linear").rows.items() if v.count > 2}
    assert rows
    for layer, shared in rows.items():
        weight = model.get_submodule(layer).weight
        whole = logits(model)
        query, key, value = shared.indices()[:3]
        for silent, others in ((value, (query, key)), (key, (query,)), (query, (key,))):
            kept = weight.detach().clone()
            with torch.no_grad():
                weight[silent] = 0
                before = logits(model)
                for other in others:
                    weight[other] = weight[other].flip(0)
            assert torch.equal(logits(model), before)
            assert not torch.equal(before, whole)
            weight.data.copy_(kept)


@pytest.mark.parametrize("rows", [Rows(1, (3, 1, 2)), Rows(3, (1, 1)), Rows(2, (2, 1, 1))])
def test_split_and_place_are_each_others_inverse(rows):
    weight = torch.randn(rows.d_out, 5)
    blocks = rows.split(weight)
    assert sum(len(block) for block in blocks) == rows.d_out
    assert torch.equal(sum(rows.place(blocks).split(5, dim=1)), weight)
    for block, own in zip(blocks, rows.indices(), strict=True):
        assert torch.equal(weight[own], block)


def test_each_projection_starts_in_its_own_minor_slice():
    model = build("phi3")
    original = copy.deepcopy(model)
    peft_model, certificate = attach_milora(model, MiloraConfig(r=3, **SLOW), progress=False)
    assert all(layer.svd_residual_ratio < 1e-5 for layer in certificate.layers)
    for name, rows in find_targets(original, "all-linear").rows.items():
        down, up = (x.detach() for x in factors(peft_model, name, MILORA))
        assert down.shape[0] == 3 * rows.count
        start = rows.split(2.0 * up @ down)
        for block, slice_of_it in zip(
            rows.split(original.get_submodule(name).weight), start, strict=True
        ):
            left, values, right = torch.linalg.svd(block.detach(), full_matrices=False)
            minor = left[:, -3:] * values[-3:] @ right[-3:]
            torch.testing.assert_close(slice_of_it, minor, atol=1e-5, rtol=1e-4)
        assert torch.equal(rows.place([torch.ones(len(x), 3) for x in rows.indices()]) == 0,
                           (up == 0))  # fmt: skip


@pytest.mark.parametrize("name", ["phi3", "persimmon", "glm4", "qwen3_5"])
def test_a_fused_model_goes_the_whole_way(name: str, tmp_path: Path):
    model = build(name)
    base, before = copy.deepcopy(model), logits(model)
    own = {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {r"0\..*o_proj": 9.0}}
    config = MiloraConfig(r=3, **SLOW, **(own if name == "phi3" else {}))
    peft_model, _ = attach_milora(model, config, progress=False)
    torch.testing.assert_close(logits(peft_model), before, atol=1e-4, rtol=0)
    train(peft_model)
    trained = logits(peft_model)
    assert (trained - before).abs().max() > 1e-2
    folder = save_adapter(peft_model, tmp_path / "adapter")
    check_files(folder, read_milora_file(folder))
    stock = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits(stock), trained, atol=1e-4, rtol=0)
    ours = load_adapter(copy.deepcopy(base), folder, trainable=True)
    for layer in find_targets(base, "all-linear").modules:
        for part in (MILORA, ANCHOR):
            pairs = zip(factors(ours, layer, part), factors(peft_model, layer, part), strict=True)
            assert all(torch.equal(loaded, saved) for loaded, saved in pairs)
    torch.testing.assert_close(logits(ours), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merge_adapter(ours)), trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_in_bfloat16_starts_without_any_difference(name):
    model = build(name).to(torch.bfloat16)
    before = logits(model)
    # PEFT reads gate_proj of this model type as a part of its experts
    layers = "attention" if name == "qwen3_next" else "all-linear"
    config = MiloraConfig(r=3, target_modules=layers, **SLOW)
    peft_model, certificate = attach_milora(model, config, progress=False)
    assert certificate.residual == "anchor"
    assert torch.equal(logits(peft_model), before)


def test_ranks_and_alphas_by_layer_are_those_of_peft():
    ranks = {"q_proj": 6, r"layers\.0\..*": 2}
    config = MiloraConfig(r=3, rank_pattern=ranks, alpha_pattern={"o_proj": 12.0}, **SLOW)
    peft_model, certificate = attach_milora(build("glm4"), config, progress=False)
    ranks = {layer.name: layer.r for layer in certificate.layers}
    assert ranks["model.layers.0.self_attn.q_proj"] == 6  # the first entry that fits counts
    assert ranks["model.layers.0.self_attn.k_proj"] == 2
    assert ranks["model.layers.1.self_attn.k_proj"] == 3
    assert ranks["model.layers.1.mlp.gate_up_proj"] == 6
    layer = peft_model.get_base_model().get_submodule("model.layers.1.self_attn.o_proj")
    assert layer.scaling[MILORA] == layer.scaling[ANCHOR] == 4.0
    assert layer.r[MILORA] == 3


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [({"rank_pattern": {"qq_proj": 2}}, "names no adapted layer"),
     ({"alpha_pattern": {"[": 2.0}}, "no regular expression"),
     ({"rank_pattern": {"qkv_proj": 17}}, "out of range")],
)  # fmt: skip
def test_patterns_that_cannot_be_kept_are_refused_by_name(pattern, reason):
    model = build("phi3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        attach_milora(model, MiloraConfig(r=3, **SLOW, **pattern), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_whole_and_methods_without_a_slice_take_fused_layers_as_one_matrix():
    for settings in ({"fused": "whole"}, {"init": "lora"}):
        _, certificate = attach_milora(
            build("phi3"), MiloraConfig(r=3, **SLOW, **settings), progress=False
        )
        assert {layer.r for layer in certificate.layers} == {3}


def test_rows_that_cannot_be_told_apart_are_refused_by_name():
    model = build("phi3")
    model.model.layers[0].self_attn.o_proj = nn.Linear(31, 32)  # heads are told by its width
    with pytest.raises(ValueError, match=r"qkv_proj: it fuses several .* Phi3Attention does not"):
        find_targets(model, "all-linear")
    assert find_targets(model, "all-linear", fused="whole").modules
