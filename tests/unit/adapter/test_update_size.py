"""Laws of the update's size: what r x r products say is what the full matrices say."""

import pytest
import torch

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.state import anchor_of, factors, lora_layer
from milora_vl.adapter.update_size import UpdateMeter, strongest_directions, summarize_update
from milora_vl.config import MiloraConfig


@torch.no_grad()
def full_update(model, weights, name, init):
    """Form s (B A - B0 A0) and W."""
    a, b = factors(model, name, "milora")
    product = b.double() @ a.double()
    if init != "lora":
        a0, minus_b0 = factors(model, name, anchor_of("milora"))
        product = product + minus_b0.double() @ a0.double()
    return lora_layer(model, name).scaling["milora"] * product, weights[name]


@pytest.mark.parametrize(
    ("init", "residual"),
    [("milora", "anchor"), ("milora", "subtract"), ("pissa", "subtract"), ("lora", "auto")],
)
def test_products_say_what_the_matrices_say(make_tiny_vlm, init, residual):
    base = make_tiny_vlm()
    weights = {name: module.weight.detach().double().clone()
               for name, module in base.named_modules()
               if isinstance(module, torch.nn.Linear)}  # fmt: skip
    config = MiloraConfig(r=4, lora_alpha=8, init=init, residual=residual, train_projector=False)
    model, certificate = attach_milora(base, config, progress=False)
    meter = UpdateMeter(model)
    assert meter.measure()["update_norm_ratio"] < 1e-6
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    found = meter.measure()
    norms, shares, total, inside, whole = [], [], 0.0, 0.0, 0.0
    for layer in certificate.layers:
        update, weight = full_update(model, weights, layer.name, init)
        u, _, vh = torch.linalg.svd(weight)
        k = meter.references[layer.name].left.shape[1]
        part = ((u[:, :k].T @ update).square().sum() + (update @ vh[:k].T).square().sum()) / 2
        norms.append(float(update.norm() / weight.norm()))
        shares.append(float(part / update.square().sum()))
        total += float(update.square().sum())
        inside += float(part)
        whole += float(weight.square().sum())
    close = {"rel": 2e-3, "abs": 1e-5}  # digits kept, and directions of a flat spectrum
    assert found["update_norm_ratios"] == pytest.approx(norms, **close)
    assert found["update_norm_ratio"] == pytest.approx((total / whole) ** 0.5, **close)
    assert found["update_principal_shares"] == pytest.approx(shares, rel=0.1, abs=0.02)
    assert found["update_principal_share"] == pytest.approx(inside / total, rel=0.05)
    line, rows = summarize_update(found, [layer.name for layer in certificate.layers])
    assert "% of the weights' norm" in line
    assert rows[0][1] == max(found["update_norm_ratios"])


def test_an_update_in_the_strongest_directions_is_told_from_one_in_the_weakest():
    torch.manual_seed(0)
    weight = torch.randn(60, 10) @ torch.randn(10, 80) + 0.1 * torch.randn(60, 80)
    u, _, vh = torch.linalg.svd(weight)
    left, right = strongest_directions(weight, 4)
    cosines = torch.linalg.svdvals(left.T @ u[:, :4]), torch.linalg.svdvals(right.T @ vh[:4].T)
    assert min(float(one.min()) for one in cosines) > 0.999


def test_dora_is_left_out(tiny_vlm):
    model, _ = attach_milora(tiny_vlm, MiloraConfig(r=4, init="dora"), progress=False)
    assert UpdateMeter(model).measure() == {}
