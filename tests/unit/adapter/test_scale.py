"""Laws of the start without singular values: orthonormal factors, and step 0 is the base."""

import pytest
import torch
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.minor_svd import minor_svd
from milora_vl.adapter.state import factors
from milora_vl.config import MiloraConfig


@pytest.mark.parametrize("residual", ["anchor", "subtract"])
def test_factors_are_orthonormal_and_step_0_is_the_base(make_tiny_vlm, batch, tmp_path, residual):
    base = make_tiny_vlm()
    before = compute_logits(base, batch)
    names = [name for name, module in base.named_modules() if name.endswith("gate_proj")]
    slices = {name: minor_svd(base.get_submodule(name).weight.data, 4) for name in names}
    config = MiloraConfig(r=4, lora_alpha=16, scale="none", residual=residual)
    model, certificate = attach_milora(base, config, batch=batch, progress=False)
    assert_close(compute_logits(model, batch), before, atol=1e-4, rtol=0)
    eye = torch.eye(4) / (config.lora_alpha / config.r)  # scaling * B0 A0 = U Vh
    for name, (u, _, vh) in slices.items():
        a, b = (one.detach() for one in factors(model, name, "milora"))
        assert_close(a @ a.T, eye, atol=1e-5, rtol=0)
        assert_close(b.T @ b, eye, atol=1e-5, rtol=0)
        assert_close(4 * (b @ a), u @ vh, atol=1e-5, rtol=0)
    assert "scale=none" in certificate.summary()
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(make_tiny_vlm(), tmp_path / "adapter", trainable=True)
    assert_close(compute_logits(loaded, batch), before, atol=1e-4, rtol=0)


def test_a_singular_value_of_zero_leaves_no_dead_direction(make_tiny_vlm):
    base = make_tiny_vlm()
    name = next(name for name, _ in base.named_modules() if name.endswith("gate_proj"))
    with torch.no_grad():
        weight = base.get_submodule(name).weight
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((u[:, :-4] * s[:-4]) @ vh[:-4])
    config = MiloraConfig(r=4, scale="none", target_modules=[name], train_projector=False)
    model, certificate = attach_milora(base, config, progress=False)
    assert certificate.layers[0].zero_directions == 0
    assert all(
        float(one.detach().norm()) == pytest.approx(2, rel=1e-3)
        for one in factors(model, name, "milora")
    )


def test_methods_without_a_spectrum_have_no_scale():
    with pytest.raises(ValueError, match="remove the key"):
        MiloraConfig(init="lora", scale="none")
