"""Laws of adapters of any kind: every tensor lands or is named, and answers are as in training."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from peft import BOFTConfig, LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from milora_vl import MiloraConfig, attach_milora, load_vlm, save_adapter
from milora_vl.adapter.portable import read_milora_file
from milora_vl.adapter.tuned import (
    choose_model,
    describe_inputs,
    load_plain_adapter,
    load_tuned,
)
from milora_vl.inference import ask

TARGETS = r"model\.language_model\..*\.(q_proj|v_proj)"
WEIGHTS = "adapter_model.safetensors"


def of_text_model(key):
    return key.replace("model.language_model.", "model.")


def of_older_transformers(key):
    key = key.replace(
        "base_model.model.model.language_model.", "base_model.model.language_model.model."
    )
    return key.replace("base_model.model.model.multi", "base_model.model.multi")


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def save_plain(model, config, folder, batch, rename=lambda key: key, **edits):
    """Save a perturbed PEFT adapter under other names; return its logits."""
    torch.manual_seed(0)
    peft_model = get_peft_model(model, config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    expected = logits(peft_model, batch)
    peft_model.save_pretrained(folder)
    tensors = {rename(key): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edits))
    return expected


LORA = {"r": 4, "target_modules": TARGETS}
PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"model.language_model.layers.0.self_attn.v_proj": 32},
}
CASES = {
    "plain": (LoraConfig(**LORA), lambda key: key, {}),
    "text model": (LoraConfig(**LORA), of_text_model, {"target_modules": ["q_proj", "v_proj"]}),
    "older names": (
        LoraConfig(**LORA, modules_to_save=["multi_modal_projector"], use_dora=True),
        of_older_transformers,
        {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
    ),
    "patterns": (
        LoraConfig(**LORA, **PATTERNS, use_rslora=True),
        of_text_model,
        {"alpha_pattern": {"model.layers.0.self_attn.v_proj": 32}},
    ),
    "boft": (BOFTConfig(boft_block_size=4, target_modules=TARGETS), lambda key: key, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_lands_under_its_name_here(make_tiny_vlm, batch, tmp_path, case):
    config, rename, edits = CASES[case]
    expected = save_plain(make_tiny_vlm(), config, tmp_path, batch, rename, **edits)
    loaded = load_plain_adapter(make_tiny_vlm(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, logits(make_tiny_vlm(), batch), atol=1e-3)


def spoil_extra(tensors):
    tensors["base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight"] = (
        torch.ones(4, 4)
    )


def spoil_missing(tensors):
    tensors.pop(next(key for key in tensors if "lora_B" in key))


def spoil_shape(tensors):
    key = next(iter(tensors))
    tensors[key] = tensors[key][:, :-1].contiguous()


def spoil_values(tensors):
    tensors[next(iter(tensors))][0, 0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_extra, r"layers\.9.*has no place"),
        (spoil_missing, r"lora_B.*is missing"),
        (spoil_shape, r"has shape"),
        (spoil_values, r"NaN or infinite"),
    ],
)
def test_a_tensor_that_does_not_land_is_named(make_tiny_vlm, batch, tmp_path, spoil, words):
    save_plain(make_tiny_vlm(), LoraConfig(**LORA), tmp_path, batch)
    tensors = load_file(tmp_path / WEIGHTS)
    spoil(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load_plain_adapter(make_tiny_vlm(), tmp_path)


def test_a_pattern_that_reaches_nothing_is_named(make_tiny_vlm, batch, tmp_path):
    edits = {"alpha_pattern": {"transformer.h.0.q": 4}}
    save_plain(make_tiny_vlm(), LoraConfig(**LORA), tmp_path, batch, **edits)
    with pytest.raises(ValueError, match=r"alpha_pattern names transformer\.h\.0\.q"):
        load_plain_adapter(make_tiny_vlm(), tmp_path)


def test_vectors_before_the_prompt_are_refused_by_name(make_tiny_vlm, tmp_path):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        token_dim=32,
        num_attention_heads=4,
        num_layers=2,
        num_transformer_submodules=1,
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        load_plain_adapter(make_tiny_vlm(), tmp_path)


@pytest.fixture
def half_checkpoint(tiny_checkpoint, tmp_path):
    """A checkpoint stored in float16, as published ones are."""
    vlm = load_vlm(tiny_checkpoint, dtype=torch.float16)
    vlm.model.save_pretrained(tmp_path / "half")
    vlm.processor.save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def trained_on(folder, out, dtype, **options):
    vlm = load_vlm(folder, dtype=dtype, prompt_style=options.pop("prompt_style", None))
    config = MiloraConfig(r=4, factor_cache=False, residual="anchor")
    peft_model, _ = attach_milora(vlm.model, config, progress=False)
    inputs = describe_inputs(vlm, **options)
    return save_adapter(peft_model, out, base=str(folder), processor=vlm.processor, inputs=inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_base_is_recognized_and_loaded_in_the_dtype_of_training(
    half_checkpoint, tmp_path, dtype
):
    adapter = trained_on(half_checkpoint, tmp_path / "adapter", dtype)
    assert read_milora_file(adapter).dtype == str(dtype).removeprefix("torch.")
    vlm = load_tuned(None, adapter, device="cpu")
    assert vlm.model.get_base_model().get_input_embeddings().weight.dtype == dtype
    for other in (torch.float16, torch.float32):  # the same rounding gives the same values
        load_tuned(half_checkpoint, adapter, dtype=other, device="cpu")


def test_what_answers_depend_on_travels_with_the_adapter(tiny_checkpoint, tmp_path, caplog):
    adapter = trained_on(
        tiny_checkpoint,
        tmp_path / "adapter",
        torch.float32,
        prompt_style="plain",
        pad_to_square=False,
    )
    with caplog.at_level(logging.WARNING, "milora_vl"):
        vlm = load_tuned(None, adapter, device="cpu")
        assert (vlm.prompt_style.name, vlm.pad_to_square) == ("plain", False)
        assert not caplog.records
        other = load_tuned(None, adapter, device="cpu", prompt_style="chatml")
    assert other.prompt_style.name == "chatml"
    assert [r.getMessage() for r in caplog.records if "prompt_style chatml" in r.getMessage()]
    assert len(caplog.records) == 1
    assert replace(vlm, pad_to_square=True).pad_to_square


def test_a_model_loaded_to_answer_can_be_cast_as_a_whole(half_checkpoint, tmp_path):
    adapter = trained_on(half_checkpoint, tmp_path / "adapter", torch.bfloat16)
    vlm = load_tuned(None, adapter, device="cpu")
    vlm.model.float()  # as ask does on a CPU that is slow in bfloat16
    assert ask(vlm, Image.new("RGB", (40, 30)), "What?", max_new_tokens=1) is not None


def test_an_adapter_folder_may_stand_for_the_model(tiny_checkpoint, tmp_path):
    adapter = trained_on(tiny_checkpoint, tmp_path / "run" / "adapter", torch.float32)
    assert choose_model(adapter, None) == (str(tiny_checkpoint), adapter)
    assert choose_model(tmp_path / "run", None) == (str(tiny_checkpoint), tmp_path / "run")
    with pytest.raises(ValueError, match="another one"):
        choose_model(adapter, adapter)
    with pytest.raises(ValueError, match="which model"):
        choose_model(None, None)
