"""The certificate tells the truth: its numbers are those a reader would compute."""

# ruff: noqa: N806 - U, S, Vh as in the paper

import json

import pytest
import torch
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.certificate import Certificate, certify_layer
from milora_vl.adapter.minor_svd import minor_svd
from milora_vl.config import MiloraConfig


def attach(model, batch=None, **settings):
    return attach_milora(model, MiloraConfig(**{"r": 6, **settings}), batch, progress=False)


def certified(weight, r=4, stored_dtype=torch.float32, subtracted=True):
    U, S, Vh = minor_svd(weight, r)
    return certify_layer(
        "layer", weight, (U, S, Vh), (U * S, Vh), stored_dtype=stored_dtype, subtracted=subtracted
    )


def test_minor_energy_is_the_share_of_the_squared_singular_values():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(weight.double())
    layer = certified(weight)
    energy = float((S[-4:] ** 2).sum() / (S**2).sum())
    assert layer.minor_energy_ratio == pytest.approx(energy, rel=1e-4)
    assert layer.minor_norm_ratio == pytest.approx(energy**0.5, rel=1e-4)
    assert (layer.sigma_max, layer.sigma_min) == pytest.approx(
        (float(S[-4]), float(S[-1])), rel=1e-4
    )
    assert layer.reconstruction_error_ratio < 1e-6
    assert layer.svd_residual_ratio < 1e-5


def test_rounding_loss_is_that_of_the_stored_principal_part():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight = weight.bfloat16().float()
    rounded = certified(weight, stored_dtype=torch.bfloat16)
    U, S, Vh = minor_svd(weight, 4)
    principal = weight.double() - ((U * S) @ Vh).double()
    loss = (principal.bfloat16().double() - principal).norm() / weight.double().norm()
    assert rounded.rounding_loss_ratio == pytest.approx(float(loss), rel=1e-2)
    assert rounded.reconstruction_error_ratio == pytest.approx(float(loss), rel=1e-2)
    assert 2**-10 < rounded.rounding_loss_ratio < 2**-8  # bfloat16 keeps 8 bits
    kept = certified(weight, stored_dtype=torch.bfloat16, subtracted=False)
    assert kept.reconstruction_error_ratio == kept.rounding_loss_ratio == 0.0
    assert kept.rounding_loss_if_subtracted_ratio == rounded.rounding_loss_ratio


def test_wrong_triplets_show():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    U, S, Vh = minor_svd(weight, 4)
    wrong = Vh.roll(1, dims=0)
    layer = certify_layer(
        "layer", weight, (U, S, wrong), (U * S, wrong), stored_dtype=None, subtracted=False
    )
    assert layer.svd_residual_ratio > 1e-2


def test_step0_difference_is_measured_on_the_given_batch(make_tiny_vlm, batch):
    batch = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    before = compute_logits(make_tiny_vlm().bfloat16(), batch)
    peft_model, certificate = attach(make_tiny_vlm().bfloat16(), batch, residual="subtract")
    wanted = float((compute_logits(peft_model, batch) - before).abs().max())
    assert certificate.step0_max_abs_logit_difference == wanted > 0.0
    assert certificate.step0_max_abs_logit == float(before.abs().max())
    assert attach(make_tiny_vlm())[1].step0_max_abs_logit_difference is None


def test_measuring_leaves_the_mode_of_the_model(tiny_vlm, batch):
    tiny_vlm.train()
    peft_model, _ = attach(tiny_vlm, batch)
    assert peft_model.training


def test_counts_and_costs(make_tiny_vlm):
    model = make_tiny_vlm()
    total = sum(p.numel() for p in model.parameters())
    _, certificate = attach(model, train_projector=False)
    shapes = [layer.shape for layer in certificate.layers]
    assert certificate.total_parameters == total
    assert certificate.trainable_parameters == sum(6 * (d_out + d_in) for d_out, d_in in shapes)
    assert certificate.seconds > 0
    assert certificate.peak_memory_gib > 0.05


def test_dead_directions_and_lossy_rounding_are_warned_about(make_tiny_vlm):
    model = make_tiny_vlm().bfloat16()
    model.model.language_model.layers[0].mlp.up_proj.weight.data.zero_()
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    U, S, Vh = torch.linalg.svd(weight.data.float(), full_matrices=False)
    S[-6:] *= 1e-3
    weight.data.copy_((U * S) @ Vh)
    _, certificate = attach(model, residual="subtract")
    dead, lossy = certificate.warnings
    assert "layers.0.mlp.up_proj, 6 of 6" in dead
    assert "layers.1.mlp.up_proj" in lossy
    assert all(f"warning: {text}" in certificate.summary() for text in certificate.warnings)


def test_json_round_trip_and_file(tiny_vlm, batch, tmp_path):
    _, certificate = attach(tiny_vlm, batch)
    text = certificate.to_json(tmp_path / "certificate.json")
    assert Certificate.from_json(text) == certificate
    assert json.loads((tmp_path / "certificate.json").read_text()) == json.loads(text)


def test_summary_names_every_kind_of_layer_and_stays_short(tiny_vlm, batch):
    _, certificate = attach(tiny_vlm, batch)
    summary = certificate.summary()
    kinds = {layer.name.rpartition(".")[2] for layer in certificate.layers}
    assert all(kind in summary for kind in kinds)
    assert "step-0 logit difference" in summary
    assert len(summary.splitlines()) < 14


def test_norm_shares_do_not_depend_on_the_scale_of_the_weight():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    small, large = certified(weight * 2**-10), certified(weight * 2**10)
    assert_close(small.minor_norm_ratio, large.minor_norm_ratio, atol=1e-6, rtol=1e-5)
