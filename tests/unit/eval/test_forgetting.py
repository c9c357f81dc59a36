"""Loss on fixed texts: what it is, and how two models are compared by it."""

import math

import pytest
import torch
from eval_models import build_vlm
from family_models import build_checkpoint

from milora_vl.eval.forgetting import (
    PROBE_TEXTS,
    compare_text_loss,
    forgetting_text,
    measure_text_loss,
)
from milora_vl.model.load import load_vlm


@pytest.fixture(scope="module")
def measured():
    return measure_text_loss(build_vlm())


def test_loss_is_the_models_own_over_all_tokens(measured):
    vlm = build_vlm()
    total, n_tokens = 0.0, 0
    for text in PROBE_TEXTS:
        ids = vlm.tokenizer(vlm.tokenizer.bos_token + text, return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(vlm.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        n_tokens += ids.shape[1] - 1
    assert measured["n_tokens"] == n_tokens
    assert measured["loss_nats_per_token"] == pytest.approx(total / n_tokens, rel=1e-5)


def test_a_copy_has_forgotten_nothing_and_a_damaged_one_has(measured):
    same = compare_text_loss(measured, measure_text_loss(build_vlm()))
    assert same["text_perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    vlm = build_vlm()
    embedding = vlm.model.get_input_embeddings().weight
    with torch.no_grad():
        vlm.model.get_output_embeddings().weight.copy_(-100 * embedding)
    worse = compare_text_loss(measured, measure_text_loss(vlm))
    ratio = worse["text_perplexity_ratio"]
    losses = [worse[f"text_loss_{when}_nats_per_token"] for when in ("before", "after")]
    assert ratio == pytest.approx(math.exp(losses[1] - losses[0]))
    low, high = worse["text_perplexity_ratio_interval_95"]
    assert 1 < low <= ratio <= high
    assert f"({low:.4f} to {high:.4f})" in forgetting_text(worse)["text_perplexity_ratio"]


def test_other_texts_or_tokens_are_not_compared(measured):
    assert compare_text_loss(measured, {**measured, "version": 99}) is None
    longer = [[nats, tokens + 1] for nats, tokens in measured["by_text"]]
    assert compare_text_loss(measured, {**measured, "by_text": longer}) is None


def test_training_mode_comes_back():
    vlm = build_vlm()
    vlm.model.train()
    measure_text_loss(vlm)
    assert vlm.model.training


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "mllama", "qwen2_vl"])
def test_no_family_reads_ahead(family, tmp_path, monkeypatch):
    vlm = load_vlm(build_checkpoint(family, tmp_path / family))
    texts = ("The red fox sat there.", "The red fox sat there. And a dog came.")
    monkeypatch.setattr("milora_vl.eval.forgetting.PROBE_TEXTS", texts)
    seen = []
    forward = vlm.model.forward

    def keep(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append(output.logits)
        return output

    monkeypatch.setattr(vlm.model, "forward", keep)
    measure_text_loss(vlm)
    n_shared = seen[0].shape[1] - 1
    torch.testing.assert_close(seen[0][:, :n_shared], seen[1][:, :n_shared], atol=1e-4, rtol=0)
