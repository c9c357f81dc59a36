"""A model that cannot be scored gets no score; one that cannot be run fast is run plainly."""

import pytest
import torch
from eval_data import write_benches
from eval_models import build_vlm, picture
from family_models import build_checkpoint
from peft import PromptTuningConfig, get_peft_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from milora_vl.eval import evaluate
from milora_vl.eval.forgetting import measure_text_loss
from milora_vl.eval.generate_plain import PlainAnswerer
from milora_vl.eval.generate_shared import SharedAnswerer, build_answerer
from milora_vl.eval.items import NonFiniteError, Request
from milora_vl.model.load import load_vlm


def break_model(model, value=float("nan")):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "layers.1.mlp.up" in name)[0, 0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_score_for_a_model_whose_logits_are_not_finite(value, tmp_path):
    data = write_benches(tmp_path / "data")
    vlm = build_vlm()
    break_model(vlm.model, value)
    options = {"progress": False, "max_new_tokens": 2, "allow_errors": 99, "text_probe": False}
    with pytest.raises(NonFiniteError, match=r"pope: .* on question (random|popular|adversarial)/"):
        evaluate(vlm, "pope", data, tmp_path / "out", **options)
    assert not (tmp_path / "out/results.json").exists()
    with pytest.raises(NonFiniteError, match="text 1 is not finite"):
        measure_text_loss(vlm)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = build_checkpoint("llava", tmp_path_factory.mktemp("llava") / "model")
    return lambda: load_vlm(path, dtype=torch.float32)


def questions():
    return [Request(str(place), f"Why {place}?", picture(place % 2)) for place in range(4)]


def test_plain_generation_finds_logits_that_are_not_finite_too(loaded):
    vlm = loaded()
    break_model(vlm.model)
    with pytest.raises(NonFiniteError, match=r"mmvet: .* on question [0-3]"):
        PlainAnswerer(vlm).answer(
            questions(), max_new_tokens=2, label="mmvet", allow_errors=9, progress=False
        )


def causal_whatever_the_mask(module, query, key, value, attention_mask, **kwargs):
    """As flash attention: causal, and deaf to a mask of pairs of tokens."""
    return sdpa_attention_forward(
        module, query, key, value, None, **{**kwargs, "is_causal": query.shape[2] > 1}
    )


def test_attention_that_takes_no_mask_is_run_plainly_and_the_log_says_so(loaded, caplog):
    vlm = loaded()
    assert isinstance(build_answerer(vlm), SharedAnswerer)
    reference = build_answerer(vlm).answer(questions(), max_new_tokens=3, progress=False)
    AttentionInterface.register("causal_whatever_the_mask", causal_whatever_the_mask)
    vlm.model.set_attn_implementation({"text_config": "causal_whatever_the_mask"})
    answerer = build_answerer(vlm, batch_size=1)
    assert isinstance(answerer, PlainAnswerer)
    assert "attention takes no mask" in caplog.text
    again = answerer.answer(questions(), max_new_tokens=3, progress=False)
    assert {key: one.text for key, one in again.items()} == {
        key: one.text for key, one in reference.items()
    }


def test_an_adapter_that_acts_outside_of_the_layers_is_run_plainly(loaded, caplog):
    vlm = loaded()
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        token_dim=vlm.model.config.text_config.hidden_size,
        num_layers=2,
        num_attention_heads=2,
        num_transformer_submodules=1,
    )
    adapted = vlm.with_model(get_peft_model(vlm.model, config))
    assert isinstance(build_answerer(adapted), PlainAnswerer)
    hooked = loaded()

    def reverse(module, args, output):
        output.logits = output.logits.flip(-1)

    hooked.model.register_forward_hook(reverse)
    assert isinstance(build_answerer(hooked), PlainAnswerer)
    assert caplog.text.count("answers come from plain batches") == 2
