"""Laws of the null-space start: quiet directions only, and what it takes out they do not feel."""

# ruff: noqa: N806 - U, S, Vh as in the paper

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from milora_vl.adapter import baselines
from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.baselines import input_moments, null_space_triplets, real_positions
from milora_vl.config import MiloraConfig
from milora_vl.data.encode import compute_branch_inputs


def made(seed=0, d_out=24, d_in=16, rank=10, n=200):
    """Return a weight, and inputs that lie in a subspace of ``rank`` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q[:, :rank]
    return weight, torch.randn(n, rank, generator=generator) @ basis.T


def test_inputs_do_not_feel_what_is_taken_out():
    weight, x = made()
    (U, S, Vh), energy = null_space_triplets(weight, x.T @ x, 6)
    part = (U * S) @ Vh
    assert energy < 1e-6
    assert part.norm() > 1.0
    assert (x @ part.T).abs().max() < 1e-4 * (x @ weight.T).abs().max()
    N = torch.linalg.svd(x.double()).Vh[10:].T  # the orthogonal complement of the inputs
    assert_close(part.double(), weight.double() @ N @ N.T, atol=1e-5, rtol=0)
    assert_close(Vh @ Vh.T, torch.eye(6), atol=1e-5, rtol=0)
    assert (S[:-1] >= S[1:]).all()


def test_no_other_directions_hold_less_energy():
    weight, _ = made()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 16, generator=generator) * torch.logspace(-2, 1, 16)
    moment = x.T @ x
    (_, _, Vh), energy = null_space_triplets(weight, moment, 4)
    inside = float((x @ Vh.T).square().sum() / x.square().sum())
    assert energy == pytest.approx(inside, rel=1e-3)
    for seed in range(20):
        torch.manual_seed(seed)
        other = torch.linalg.qr(torch.randn(16, 4)).Q
        assert inside < float((x @ other).square().sum() / x.square().sum())


def test_moments_are_those_of_real_positions_only(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(6, 4)

        def forward(self, x, attention_mask):
            return self.second(self.first(x))

    model = Model().train()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batches = [{"x": x, "attention_mask": mask}, {"x": 2 * x, "attention_mask": mask}]
    layers = {"first": model.first, "second": model.second}
    real = x[mask.bool()]
    for limit in (baselines.MOMENT_BYTES, 1):  # together, and one group a layer
        monkeypatch.setattr(baselines, "MOMENT_BYTES", limit)
        found = dict(input_moments(model, layers, iter(batches), progress=False))
        assert list(found) == ["first", "second"]
        assert_close(found["first"], 5 * real.T @ real)
        assert_close(found["second"].diagonal().sum(), 5 * model.first(real).square().sum())
    assert model.training
    before = found["first"].clone()
    model(**batches[0])
    assert torch.equal(found["first"], before)  # nothing listens any more


def test_certificate_says_how_much_of_the_input_is_inside(make_tiny_vlm, batch):
    config = MiloraConfig(r=4, init="null_space")
    _, certificate = attach_milora(
        make_tiny_vlm(), config, batch, progress=False, calibration=[batch]
    )
    for layer in certificate.layers:
        assert 0 <= layer.input_energy_ratio < 4 / layer.shape[1]
    assert "input energy" in certificate.summary()
    _, minor = attach_milora(make_tiny_vlm(), MiloraConfig(r=4), progress=False)
    assert all(layer.input_energy_ratio is None for layer in minor.layers)


def test_missing_calibration_is_refused_and_leaves_the_base_whole(make_tiny_vlm):
    base = make_tiny_vlm()
    names = list(base.state_dict())
    with pytest.raises(ValueError, match="pass calibration batches"):
        attach_milora(base, MiloraConfig(r=4, init="null_space"), progress=False)
    assert list(base.state_dict()) == names


def test_padding_is_found_in_a_mask_of_branches_too():
    rows = [torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 0])]
    inputs = compute_branch_inputs(rows, 6)
    expected = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    assert torch.equal(real_positions(inputs), expected)
    seen = {"attention_mask": inputs["attention_mask"] == 0}
    assert torch.equal(real_positions(seen), expected)
    assert real_positions({}) is None


def test_layers_that_see_tokens_in_one_row_leave_padding_out():
    layer = nn.Linear(8, 4)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, attention_mask):
            return self.layer(x.flatten(0, 1))

    batch = {"x": x, "attention_mask": mask}
    ((_, moment),) = input_moments(Flat(), {"layer": layer}, [batch], progress=False)
    real = x[mask.bool()]
    assert_close(moment, real.T @ real)
