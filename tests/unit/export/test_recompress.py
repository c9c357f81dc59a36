"""Laws of recompression: the best approximation of its rank, and an honest account of the loss."""

# ruff: noqa: N806 - A, B, S as in the paper

import pytest
import torch
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.portable import portable_tensors
from milora_vl.adapter.state import recall
from milora_vl.config import MiloraConfig
from milora_vl.export.merge import recompress, recompress_tensors, summarize, truncation_report


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 16), (16, 24), (6, 40), (40, 6), (3, 3)])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_product_is_the_best_of_its_rank(d_out, d_in, r):
    torch.manual_seed(r)
    lora_A, lora_B, scaling = torch.randn(8, d_in), torch.randn(d_out, 8), 1.7
    A, B, S = recompress(lora_A, lora_B, scaling, r)
    assert A.shape == (r, d_in)
    assert B.shape == (d_out, r)
    whole = scaling * lora_B.double() @ lora_A.double()
    U, wanted, Vh = torch.linalg.svd(whole, full_matrices=False)
    assert_close(S[: wanted.numel()], wanted[: S.numel()], atol=1e-9, rtol=1e-9)
    best = (U[:, :r] * wanted[:r]) @ Vh[:r]
    assert_close(B.double() @ A.double(), best, atol=1e-4, rtol=0)
    error = (whole - B.double() @ A.double()).norm()
    assert_close(error, S[r:].norm(), atol=1e-5, rtol=1e-3)


def test_full_rank_loses_nothing_and_less_loses_what_it_says(make_tiny_vlm, batch):
    peft_model, _ = attach_milora(make_tiny_vlm(), MiloraConfig(r=3), progress=False)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    tensors, state = portable_tensors(peft_model), recall(peft_model)
    norms = []
    for r in (6, 4, 2):
        small, new_state, losses = recompress_tensors(tensors, state, r)
        assert (new_state.r, new_state.scaling, new_state.has_anchor) == (r, 1.0, False)
        assert small.keys() == tensors.keys()
        report = truncation_report(losses, r, 6)
        assert report["error"] ** 2 == pytest.approx(sum(x.error**2 for x in losses))
        norms.append(report["error_ratio"])
        worst = max(losses, key=lambda loss: loss.error_ratio)
        assert worst.name in summarize(report)
        for loss in losses:
            A, B = (tensors[f"base_model.model.{loss.name}.lora_{f}.weight"] for f in "AB")
            C, D = (small[f"base_model.model.{loss.name}.lora_{f}.weight"] for f in "AB")
            error = (B @ A - D @ C).norm() / (B @ A).norm()
            assert loss.error_ratio == pytest.approx(float(error), abs=1e-5)
    assert norms[0] < 1e-6 < norms[1] < norms[2] < 1


def test_untouched_adapter_has_nothing_to_lose(make_tiny_vlm):
    peft_model, _ = attach_milora(make_tiny_vlm(), MiloraConfig(r=2, init="lora"), progress=False)
    _, _, losses = recompress_tensors(portable_tensors(peft_model), recall(peft_model), 1)
    assert all(loss.error == loss.norm == loss.error_ratio == 0.0 for loss in losses)


def test_ranks_out_of_range_and_dora_are_refused(make_tiny_vlm):
    peft_model, _ = attach_milora(make_tiny_vlm(), MiloraConfig(r=2), progress=False)
    tensors, state = portable_tensors(peft_model), recall(peft_model)
    for r in (0, 5):
        with pytest.raises(ValueError, match="this adapter has rank 4"):
            recompress_tensors(tensors, state, r)
    peft_model, _ = attach_milora(make_tiny_vlm(), MiloraConfig(r=2, init="dora"), progress=False)
    with pytest.raises(ValueError, match="DoRA"):
        recompress_tensors(portable_tensors(peft_model), recall(peft_model), 1)
