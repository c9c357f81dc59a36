"""Laws of matching layers: full names inside the language model, everything else refused."""

import ast

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from milora_vl.adapter.quantized import is_quantized
from milora_vl.adapter.targets import check_layers, find_targets, resolve_residual


def test_suffix_that_hits_the_clip_tower_is_refused_with_a_pattern_that_works(tiny_vlm):
    with pytest.raises(ValueError, match=r"vision_tower") as caught:
        find_targets(tiny_vlm, ["q_proj", "v_proj"])
    pattern = str(caught.value).rpartition("target_modules=")[2].strip("'").replace("\\\\", "\\")
    modules = find_targets(tiny_vlm, pattern).modules
    assert len(modules) == 4
    assert all(name.startswith("model.language_model.") for name in modules)


@pytest.mark.parametrize(
    "wrong",
    [
        "[", "q_proj,v_proj", ["query"], ["lm_head"], ["linear_1"], ["embed_tokens"], r".*proj",
        r".*layers\.\d+", r"model\.vision_tower\..*fc1",
        ["model.vision_tower.encoder.layers.0.self_attn.q_proj"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("allow_outside", [False, True])
def test_every_refusal_ends_with_a_choice_that_is_accepted(tiny_vlm, wrong, allow_outside):
    try:
        find_targets(tiny_vlm, wrong, allow_outside=allow_outside)
    except ValueError as error:
        choice = ast.literal_eval(str(error).rpartition("target_modules=")[2])
        modules = find_targets(tiny_vlm, choice).modules
        assert all(name.startswith("model.language_model.") for name in modules)
        assert modules
    else:
        assert allow_outside


def test_suffix_that_hits_only_the_language_model_is_accepted(make_tiny_vlm):
    modules = find_targets(make_tiny_vlm("dinov2"), ["down_proj"]).modules
    assert modules == tuple(f"model.language_model.layers.{i}.mlp.down_proj" for i in range(2))


@pytest.mark.parametrize(
    "target_modules", [["lm_head"], ["linear_1"], r".*proj", r"model\.vision_tower\..*fc1"]
)
def test_head_projector_and_tower_are_refused(tiny_vlm, target_modules):
    with pytest.raises(ValueError, match=r"outside the language model|it is a"):
        find_targets(tiny_vlm, target_modules)


def test_layers_that_are_not_linear_are_refused(tiny_vlm):
    with pytest.raises(ValueError, match="embed_tokens: it is a Embedding"):
        find_targets(tiny_vlm, ["embed_tokens"])


def test_no_match_is_refused(tiny_vlm):
    with pytest.raises(ValueError, match="matches no linear layer"):
        find_targets(tiny_vlm, ["query"])


def test_transposed_layer_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"Conv1D|fuses"):
        find_targets(model, "all-linear")
    with pytest.raises(ValueError, match="Conv1D"):
        find_targets(model, ["c_proj"])


def test_meta_weights_are_matched_but_not_decomposed(make_tiny_vlm):
    wanted = find_targets(make_tiny_vlm(), "all-linear")
    assert find_targets(make_tiny_vlm().to("meta"), "all-linear") == wanted
    with pytest.raises(ValueError, match="not loaded"):
        check_layers(make_tiny_vlm().to("meta"), wanted.modules, r=2)


def test_tower_and_head_are_matched_only_if_asked_for(tiny_vlm):
    pattern = r".*(q_proj|lm_head)"
    modules = find_targets(tiny_vlm, pattern, allow_outside=True).modules
    assert "lm_head" in modules
    assert sum("vision_tower" in name for name in modules) == 2
    with pytest.raises(ValueError, match="the projector trains in full"):
        find_targets(tiny_vlm, ["linear_1"], allow_outside=True)
    tiny_vlm.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="also the input embedding"):
        find_targets(tiny_vlm, pattern, allow_outside=True)


def test_quantized_is_judged_by_class_not_dtype():
    bnb = pytest.importorskip("bitsandbytes")
    # packed 4-bit values under a float storage dtype: the dtype alone looks like a plain weight
    layer = bnb.nn.Linear4bit(
        32, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4",
        quant_storage=torch.bfloat16,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 32), requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16
    )
    layer = layer.to("cpu")
    assert layer.weight.dtype == torch.bfloat16
    assert is_quantized(layer.weight)
    model = nn.ModuleDict({"layer": layer})
    assert resolve_residual(model, ["layer"], "auto") == "anchor"
    with pytest.raises(ValueError, match="quantized"):
        resolve_residual(model, ["layer"], "subtract")
    assert not is_quantized(nn.Linear(4, 4).bfloat16().weight)


def test_presets_part_the_layers_of_all_linear(make_tiny_vlm):
    model = make_tiny_vlm()
    found = {
        name: find_targets(model, name).modules
        for name in ("all-linear", "attention", "mlp", "gate_up")
    }
    assert sorted(found["attention"] + found["mlp"]) == sorted(found["all-linear"])
    ends = {name: {m.rpartition(".")[2] for m in modules} for name, modules in found.items()}
    assert ends["attention"] == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert ends["gate_up"] == {"gate_proj", "up_proj"}
    assert ends["mlp"] == {"gate_proj", "up_proj", "down_proj"}
    skipped = find_targets(model, "attention").skipped
    assert set(found["mlp"]) <= set(skipped)
