"""Laws of attaching: the function stays, only what should train trains, only what should match."""

# ruff: noqa: N806 - A, B, U, S, Vh as in the paper

import copy

import pytest
import torch
from peft import LoraConfig
from small_models import train
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.state import (
    ANCHOR,
    MILORA,
    activate,
    factors,
    lora_layer,
    pretrained_function,
)
from milora_vl.config import MiloraConfig

RESIDUALS = ["subtract", "anchor"]
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def attach(model, batch=None, **settings):
    settings = {"r": 6, "lora_alpha": 12, **settings}
    return attach_milora(model, MiloraConfig(**settings), batch=batch, progress=False)


def in_dtype(batch, dtype):
    return {**batch, "pixel_values": batch["pixel_values"].to(dtype)}


@pytest.mark.parametrize("slice_name", ["minor", "principal", "middle", "random"])
def test_principal_plus_adapter_is_the_weight(tiny_vlm, slice_name):
    original = copy.deepcopy(tiny_vlm)
    peft_model, certificate = attach(tiny_vlm, residual="subtract", slice=slice_name)
    for name in certificate.matched["language_model"]:
        layer = lora_layer(peft_model, name)
        A, B = factors(peft_model, name, MILORA)
        rebuilt = layer.get_base_layer().weight + layer.scaling[MILORA] * B @ A
        weight = original.get_submodule(name).weight
        assert_close(rebuilt, weight, atol=1e-5, rtol=0)
        assert (layer.get_base_layer().weight - weight).norm() > 1e-3  # something was subtracted


@pytest.mark.parametrize("residual", RESIDUALS)
def test_adapter_spans_the_minor_subspace(tiny_vlm, residual):
    original = copy.deepcopy(tiny_vlm).double()
    peft_model, certificate = attach(tiny_vlm, residual=residual)
    for name in certificate.matched["language_model"]:
        U, S, Vh = torch.linalg.svd(original.get_submodule(name).weight, full_matrices=False)
        minor = (U[:, -6:] * S[-6:]) @ Vh[-6:]
        A, B = (factor.double() for factor in factors(peft_model, name, MILORA))
        assert_close(2.0 * B @ A, minor, atol=1e-5, rtol=0)  # scaling = 12 / 6
        # the singular values are shared evenly: rows of A and columns of B have norm sqrt(S / s)
        root = (S[-6:] / 2.0).sqrt()
        assert_close(A.norm(dim=1), root, atol=1e-4, rtol=1e-4)
        assert_close(B.norm(dim=0), root, atol=1e-4, rtol=1e-4)
        rows = torch.linalg.qr(A.T).Q
        assert_close(rows @ rows.T, Vh[-6:].T @ Vh[-6:], atol=1e-3, rtol=0)
        A0, minus_B0 = factors(peft_model, name, ANCHOR)
        assert torch.equal(A0.double(), A)
        assert torch.equal(-minus_B0.double(), B)


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_function_is_unchanged_at_step_0_in_float32(make_tiny_vlm, batch, residual, tower):
    before = compute_logits(make_tiny_vlm(tower), batch)
    peft_model, certificate = attach(make_tiny_vlm(tower), batch, residual=residual)
    assert_close(compute_logits(peft_model, batch), before, atol=1e-4, rtol=0)
    assert certificate.step0_max_abs_logit_difference < 1e-4
    assert float(before.std()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anchor_is_exact_in_low_precision_and_subtract_is_not(make_tiny_vlm, batch, dtype):
    batch = in_dtype(batch, dtype)
    peft_model, exact = attach(make_tiny_vlm().to(dtype), batch, residual="anchor")
    assert exact.step0_max_abs_logit_difference == 0.0
    A, _ = factors(peft_model, exact.layers[0].name, MILORA)
    assert A.dtype == torch.float32
    _, lossy = attach(make_tiny_vlm().to(dtype), batch, residual="subtract")
    assert lossy.step0_max_abs_logit_difference > 0.0
    assert all(layer.rounding_loss_ratio > 0.0 for layer in lossy.layers)
    assert all(layer.rounding_loss_ratio == 0.0 for layer in exact.layers)


def test_auto_subtracts_in_float32_and_anchors_below(make_tiny_vlm):
    assert attach(make_tiny_vlm())[1].residual == "subtract"
    assert attach(make_tiny_vlm().bfloat16())[1].residual == "anchor"


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_only_language_model_projections_match(make_tiny_vlm, tower):
    _, certificate = attach(make_tiny_vlm(tower))
    matched = certificate.matched["language_model"]
    wanted = {
        f"model.language_model.layers.{index}.{block}.{name}"
        for index in range(2)
        for block, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", ("gate_proj", "up_proj", "down_proj")),
        )
        for name in names
    }
    assert set(matched) == wanted


@pytest.mark.parametrize("residual", RESIDUALS)
def test_training_moves_only_the_adapter_and_the_projector(tiny_vlm, batch, residual):
    peft_model, certificate = attach(tiny_vlm, residual=residual)
    before = {name: value.detach().clone() for name, value in peft_model.named_parameters()}
    peft_model.train()
    train(peft_model, batch)
    moved = {
        name
        for name, value in peft_model.named_parameters()
        if not torch.equal(value, before[name])
    }
    wanted = {
        f"base_model.model.{name}.lora_{factor}.milora.weight"
        for name in certificate.matched["language_model"]
        for factor in "AB"
    }
    projector = "base_model.model.model.multi_modal_projector.modules_to_save.milora"
    wanted |= {f"{projector}.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert moved == wanted
    assert certificate.trainable_parameters == sum(before[name].numel() for name in wanted)


def test_projector_stays_frozen_if_asked(tiny_vlm):
    peft_model, certificate = attach(tiny_vlm, train_projector=False)
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert certificate.matched["projector"] == []


def test_dropout_is_on_the_trainable_adapter_only(tiny_vlm, batch):
    before = compute_logits(tiny_vlm, batch)
    peft_model, certificate = attach(tiny_vlm, residual="anchor", lora_dropout=0.5)
    dropout = lora_layer(peft_model, certificate.layers[0].name).lora_dropout
    assert isinstance(dropout[MILORA], torch.nn.Dropout)
    assert isinstance(dropout[ANCHOR], torch.nn.Identity)
    assert_close(compute_logits(peft_model, batch), before, atol=1e-4, rtol=0)


def test_anchor_keeps_the_bits_of_the_base_under_several_adapters(tiny_vlm, batch):
    original = {name: value.clone() for name, value in tiny_vlm.state_dict().items()}
    model = tiny_vlm
    for slice_name in ("minor", "principal"):
        peft_model, _ = attach(
            model, residual="anchor", slice=slice_name, train_projector=False, r=4
        )
        config = LoraConfig(r=2, target_modules=["o_proj"], exclude_modules=".*vision.*")
        peft_model.add_adapter("other", config)
        train(peft_model, batch)
        model = peft_model.unload()
        assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("residual", RESIDUALS)
def test_pretrained_function_is_available_and_leaves_no_trace(tiny_vlm, batch, residual):
    before = compute_logits(tiny_vlm, batch)
    peft_model, _ = attach(tiny_vlm, residual=residual)
    train(peft_model, batch)
    trained = compute_logits(peft_model, batch)
    flags = [p.requires_grad for p in peft_model.parameters()]
    with pretrained_function(peft_model):
        assert_close(compute_logits(peft_model, batch), before, atol=1e-4, rtol=0)
    assert torch.equal(compute_logits(peft_model, batch), trained)
    assert [p.requires_grad for p in peft_model.parameters()] == flags
    assert (trained - before).abs().max() > 1e-2


def test_activate_freezes_the_anchor_that_peft_woke(tiny_vlm):
    peft_model, certificate = attach(tiny_vlm, residual="anchor")
    name = certificate.layers[0].name
    with peft_model.disable_adapter():
        pass
    activate(peft_model, "anchor", trainable=True)
    assert [f.requires_grad for f in factors(peft_model, name, ANCHOR)] == [False, False]
    assert [f.requires_grad for f in factors(peft_model, name, MILORA)] == [True, True]


def test_an_inactive_anchor_does_not_follow_the_model_to_its_device(tiny_vlm):
    peft_model, certificate = attach(tiny_vlm, residual="subtract")
    name = certificate.layers[0].name
    start = [factor.clone() for factor in factors(peft_model, name, MILORA)]
    with pretrained_function(peft_model):  # needs the anchor, and puts it away again
        assert ANCHOR in lora_layer(peft_model, name).lora_A
    peft_model.to("meta")  # any second device
    assert all(parameter.is_meta for parameter in peft_model.parameters())
    A0, minus_B0 = factors(peft_model, name, ANCHOR)
    assert torch.equal(A0, start[0])
    assert torch.equal(-minus_B0, start[1])


def test_bad_weight_is_named_and_leaves_the_base_whole(tiny_vlm):
    weight = tiny_vlm.model.language_model.layers[1].mlp.up_proj.weight
    weight.data[3, 4] = float("nan")
    before = {name: value.clone() for name, value in tiny_vlm.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: 1 of \d+ values are NaN"):
        attach(tiny_vlm)
    after = tiny_vlm.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in after.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupted_decomposition_leaves_the_base_whole(tiny_vlm, monkeypatch, dtype):
    from milora_vl.adapter import decompose as layer_file

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return milora_svd(*args, **kwargs)

    milora_svd = layer_file.minor_svd
    monkeypatch.setattr(layer_file, "minor_svd", interrupted)
    projector = tiny_vlm.to(dtype).model.multi_modal_projector
    before = {name: value.clone() for name, value in tiny_vlm.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        attach(tiny_vlm, residual="subtract")
    after = tiny_vlm.state_dict()
    assert tiny_vlm.model.multi_modal_projector is projector
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_rank_above_a_layer_is_refused_with_its_name(tiny_vlm):
    with pytest.raises(ValueError, match=r"k_proj: r=17 is out of range for shape \(16, 32\)"):
        attach(tiny_vlm, r=17)


def test_second_attach_is_refused(tiny_vlm):
    peft_model, _ = attach(tiny_vlm)
    with pytest.raises(ValueError, match="already carries a PEFT adapter"):
        attach(peft_model)


def test_text_model_works_without_a_projector():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    batch = {"input_ids": torch.arange(8)[None]}
    _, certificate = attach(LlamaForCausalLM(config).eval(), batch)
    assert certificate.step0_max_abs_logit_difference < 1e-4
    assert {layer.name.rpartition(".")[2] for layer in certificate.layers} == PROJECTIONS


def test_config_is_frozen_and_strict():
    config = MiloraConfig(r=8)
    assert config.scaling == 1.0
    assert MiloraConfig(r=8, lora_alpha=4).scaling == 0.5
    with pytest.raises(ValueError, match="frozen"):
        config.r = 4
    with pytest.raises(ValueError, match="rank"):
        MiloraConfig(rank=8)
    with pytest.raises(ValueError, match="slice"):
        MiloraConfig(slice="max")
