"""Laws of experts in one tensor: each starts in its own minor slice, exact from start to merge."""

import copy
from pathlib import Path

import pytest
import torch
from fused_models import MIXTURES, SLOW, build, logits, train
from peft import PeftModel

from milora_vl import MiloraConfig, attach_milora, load_adapter, merge_adapter, save_adapter
from milora_vl.adapter.checkpoint import check_files, read_milora_file
from milora_vl.adapter.experts import Stack
from milora_vl.adapter.state import ANCHOR, MILORA, factors, recall
from milora_vl.adapter.targets import find_targets


@pytest.mark.parametrize("transposed", [False, True])
def test_packing_joining_and_parting_are_exact(transposed):
    stack = Stack(count=3, transposed=transposed)
    left, right = torch.randn(3, 5, 2), torch.randn(3, 2, 4)
    pair = stack.pack(left, right)
    assert all(map(torch.equal, stack.unpack(*pair), (left, right)))
    other = stack.pack(torch.randn(3, 5, 2), torch.randn(3, 2, 4))
    joined = stack.join([pair, other])
    for index, one in enumerate((pair, other)):
        assert all(map(torch.equal, stack.part(*joined, index, 2), one))
    total = stack.add_(torch.zeros(3, 5, 4), *joined, 0.5)
    apart = stack.add_(stack.add_(torch.zeros(3, 5, 4), *pair, 0.5), *other, 0.5)
    torch.testing.assert_close(total, apart)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_goes_the_whole_way(name: str, tmp_path: Path):
    model = build(name, MIXTURES)
    base, before = copy.deepcopy(model), logits(model)
    config = MiloraConfig(r=2, experts="all", **SLOW)
    peft_model, certificate = attach_milora(model, config, progress=False)
    state = recall(peft_model)
    assert set(state.experts) == set(find_targets(base, "all-linear").experts)
    assert all(layer.svd_residual_ratio < 1e-5 for layer in certificate.layers)
    torch.testing.assert_close(logits(peft_model), before, atol=1e-4, rtol=0)
    for target in state.experts:  # what is added to every expert is its own minor slice
        stack = state.stack_of(target)
        pair = [factor.detach() for factor in factors(peft_model, target, MILORA)]
        weight = base.get_parameter(target).detach()
        start = stack.add_(torch.zeros_like(weight), *pair, state.scaling)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        minor = left[..., -2:] * values[:, None, -2:] @ right[:, -2:]
        torch.testing.assert_close(start, minor, atol=1e-5, rtol=1e-4)
    train(peft_model)
    trained = logits(peft_model)
    assert (trained - before).abs().max() > 1e-2
    folder = save_adapter(peft_model, tmp_path / "adapter")
    check_files(folder, read_milora_file(folder))
    stock = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits(stock), trained, atol=1e-4, rtol=0)
    ours = load_adapter(copy.deepcopy(base), folder, trainable=True)
    for target in state.modules:
        for part in (MILORA, ANCHOR):
            pairs = zip(factors(ours, target, part), factors(peft_model, target, part), strict=True)
            assert all(torch.equal(loaded, saved) for loaded, saved in pairs)
    torch.testing.assert_close(logits(ours), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merge_adapter(ours)), trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_in_bfloat16_starts_without_any_difference(name):
    model = build(name, MIXTURES).to(torch.bfloat16)
    before = logits(model)
    config = MiloraConfig(r=2, experts="all", **SLOW)
    peft_model, certificate = attach_milora(model, config, progress=False)
    assert certificate.residual == "anchor"
    assert torch.equal(logits(peft_model), before)


def test_auto_takes_experts_only_where_they_cost_little_and_can_be_adapted(monkeypatch):
    def experts(**settings):
        config = MiloraConfig(r=2, **{**SLOW, **settings})
        peft_model, _ = attach_milora(build("qwen3_5_moe", MIXTURES), config, progress=False)
        return set(recall(peft_model).experts)

    assert len(experts()) == 4
    assert experts(lora_dropout=0.1) == set()
    assert experts(experts="none") == set()
    assert experts(target_modules="attention") == set()
    with pytest.raises(
        ValueError, match=r"experts=all: .*experts\.gate_up_proj cannot have dropout"
    ):
        experts(experts="all", lora_dropout=0.1)
    with pytest.raises(ValueError, match="init=lora, which starts from no slice"):
        experts(experts="all", init="lora")
    monkeypatch.setattr("milora_vl.adapter.targets.EXPERTS_LIMIT", 100)
    assert experts() == set()


def test_experts_that_are_not_there_cannot_be_asked_for():
    config = MiloraConfig(r=2, experts="all", target_modules="attention")
    with pytest.raises(ValueError, match="hold no experts in one tensor"):
        attach_milora(build("qwen3_moe", MIXTURES), config, progress=False)
