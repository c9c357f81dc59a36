"""Laws of all methods under one recipe: same start, base untouched, one way to save."""

# ruff: noqa: N806 - A, B as in the paper

from typing import get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import train
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.certificate import Certificate
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.state import (
    MILORA,
    PLAIN_INITS,
    factors,
    magnitude,
    pretrained_function,
    recall,
)
from milora_vl.config import Init, MiloraConfig
from milora_vl.export.merge import merge_adapter

INITS = get_args(Init)
ANCHORED = [init for init in INITS if init not in PLAIN_INITS]
CLOSE = {"atol": 2e-4, "rtol": 0}


def attach(model, batch, init, **settings):
    config = MiloraConfig(**{"r": 6, "lora_alpha": 12, "init": init, **settings})
    return attach_milora(model, config, batch, progress=False, calibration=[batch])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("residual", ["auto", "anchor"])
def test_starts_as_the_base_trains_and_loads_in_stock_peft(
    make_tiny_vlm, batch, tmp_path, init, residual
):
    before = compute_logits(make_tiny_vlm(), batch)
    peft_model, certificate = attach(make_tiny_vlm(), batch, init, residual=residual)
    assert certificate.init == init
    assert certificate.step0_max_abs_logit_difference < 1e-4
    assert_close(compute_logits(peft_model, batch), before, **CLOSE)
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert init in certificate.summary()
    live = compute_logits(train(peft_model, batch), batch)
    assert (live - before).abs().max() > 1e-3
    folder = save_adapter(peft_model, tmp_path / "a")
    stock = PeftModel.from_pretrained(make_tiny_vlm(), folder)
    assert_close(compute_logits(stock, batch), live, **CLOSE)
    loaded = load_adapter(make_tiny_vlm(), folder)
    assert recall(loaded).init == init
    assert_close(compute_logits(loaded, batch), live, **CLOSE)
    with pretrained_function(peft_model):
        projected = compute_logits(peft_model, batch)
    assert_close(projected, before, **CLOSE)
    assert_close(compute_logits(merge_adapter(peft_model), batch), live, **CLOSE)


@pytest.mark.parametrize("init", INITS)
def test_the_base_keeps_its_bits_where_nothing_is_subtracted(make_tiny_vlm, batch, init):
    model = make_tiny_vlm().bfloat16()
    low = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    original = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"train_projector": False}
    peft_model, certificate = attach(model, low, init, **settings)
    if init != "dora":  # its scale, magnitude over norm, is rounded like every product
        assert certificate.step0_max_abs_logit_difference == 0.0
    train(peft_model, low)
    after = peft_model.unload().state_dict()
    assert all(torch.equal(value, original[name]) for name, value in after.items())


@pytest.mark.parametrize("init", INITS)
def test_four_steps_are_two_and_two_after_a_resume(make_tiny_vlm, batch, tmp_path, init):
    whole = train(attach(make_tiny_vlm(), batch, init)[0], batch, 4)
    torch.manual_seed(0)
    half = train(attach(make_tiny_vlm(), batch, init)[0], batch, 2)
    if init in ("lora", "rslora", "dora"):  # A is random: start both from the same
        folder = save_adapter(attach(make_tiny_vlm(), batch, init)[0], tmp_path / "start")
        whole = train(load_adapter(make_tiny_vlm(), folder, trainable=True), batch, 4)
        half = train(load_adapter(make_tiny_vlm(), folder, trainable=True), batch, 2)
    names = [name for name, p in half.named_parameters() if p.requires_grad]
    save_adapter(half, tmp_path / "a")
    resumed = load_adapter(make_tiny_vlm(), tmp_path / "a", trainable=True)
    assert [name for name, p in resumed.named_parameters() if p.requires_grad] == names
    assert torch.equal(
        compute_logits(train(resumed, batch, 2), batch), compute_logits(whole, batch)
    )


def test_pissa_takes_the_factors_that_peft_would(make_tiny_vlm, batch):
    ours, certificate = attach(make_tiny_vlm(), batch, "pissa", train_projector=False)
    names = certificate.matched["language_model"]
    config = LoraConfig(r=6, lora_alpha=12, target_modules=names, init_lora_weights="pissa")
    theirs = get_peft_model(make_tiny_vlm(), config)
    for name in names:
        A, B = factors(ours, name, MILORA)
        layer = theirs.get_base_model().get_submodule(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close(B @ A, product, atol=1e-5, rtol=0)
        assert_close(
            ours.get_base_model().get_submodule(name).get_base_layer().weight,
            layer.get_base_layer().weight,
            atol=1e-5,
            rtol=0,
        )


def test_olora_takes_pefts_factors_and_leaves_the_base_alone(make_tiny_vlm, batch):
    ours, certificate = attach(make_tiny_vlm(), batch, "olora", residual="anchor")
    original, names = make_tiny_vlm(), certificate.matched["language_model"]
    config = LoraConfig(r=6, lora_alpha=12, target_modules=names, init_lora_weights="olora")
    theirs = get_peft_model(make_tiny_vlm(), config)
    for name in names:
        layer = theirs.get_base_model().get_submodule(name)
        for mine, peft_own in zip(
            factors(ours, name, MILORA),
            (layer.lora_A["default"].weight, layer.lora_B["default"].weight),
            strict=True,
        ):
            assert_close(mine, peft_own)
        kept = ours.get_base_model().get_submodule(name).get_base_layer().weight
        assert torch.equal(kept, original.get_submodule(name).weight)


def test_mica_trains_a_alone_from_the_minor_left_vectors(make_tiny_vlm, batch):
    peft_model, certificate = attach(make_tiny_vlm(), batch, "mica")
    name = certificate.layers[0].name
    A, B = factors(peft_model, name, MILORA)
    U = torch.linalg.svd(make_tiny_vlm().get_submodule(name).weight.double()).U[:, -6:]
    assert_close(B.detach().double() @ B.detach().double().T, U @ U.T, atol=1e-4, rtol=0)
    assert not A.any()
    assert (A.requires_grad, B.requires_grad) == (True, False)
    before = B.clone()
    train(peft_model, batch)
    assert torch.equal(B, before)
    assert A.any()


def test_rslora_scales_by_the_square_root_of_r(make_tiny_vlm, batch):
    peft_model, certificate = attach(make_tiny_vlm(), batch, "rslora")
    layer = peft_model.get_base_model().get_submodule(certificate.layers[0].name)
    assert layer.scaling[MILORA] == pytest.approx(12 / 6**0.5)
    assert certificate.scaling == recall(peft_model).scaling == pytest.approx(12 / 6**0.5)


def test_doras_magnitude_survives(make_tiny_vlm, batch, tmp_path):
    peft_model = train(attach(make_tiny_vlm(), batch, "dora")[0], batch)
    name = recall(peft_model).modules[0]
    wanted = magnitude(peft_model, name)
    start = make_tiny_vlm().get_submodule(name).weight.norm(dim=1)
    assert (wanted - start).abs().max() > 1e-5  # it was trained
    folder = save_adapter(peft_model, tmp_path / "a")
    assert torch.equal(magnitude(load_adapter(make_tiny_vlm(), folder), name), wanted)


def test_a_slice_that_contradicts_the_method_is_refused():
    assert MiloraConfig(init="pissa").spectrum == "principal"
    assert MiloraConfig(init="slice:middle", slice="middle").spectrum == "middle"
    assert MiloraConfig(slice="random").spectrum == "random"
    assert MiloraConfig(init="lora").spectrum is None
    with pytest.raises(ValueError, match="contradicts"):
        MiloraConfig(init="pissa", slice="middle")
    with pytest.raises(ValueError, match="init"):
        MiloraConfig(init="slice:minor")
