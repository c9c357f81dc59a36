"""Laws of QMiLoRA beside the rest: factor cache, other methods, several, exports, text models."""

from pathlib import Path

import pytest
import torch
from chat_tokenizers import build_byte_level
from small_models import build_llama

from milora_vl.adapter import decompose as layer_file
from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import (
    add_adapter_from,
    load_adapter,
    remove_adapter,
    save_adapter,
    unload_adapters,
    use_adapter,
)
from milora_vl.adapter.quantized import is_quantized
from milora_vl.adapter.state import ANCHOR, factors, recall
from milora_vl.config import MiloraConfig
from milora_vl.export.forms import export_adapter
from milora_vl.export.logits_check import check_batches, drawn_picture
from milora_vl.model.load import load_vlm

pytest.importorskip("bitsandbytes")


@pytest.fixture
def load(whole_checkpoint: Path):
    options = {"dtype": torch.float32, "prompt_style": "chatml"}
    return lambda quantization="nf4": load_vlm(
        whole_checkpoint, quantization=quantization, **options
    )


def attach(vlm, **settings):
    config = MiloraConfig(**{"r": 4, **settings})
    return attach_milora(vlm.model, config, progress=False, weights=vlm.float_weights)[0]


def example(vlm):
    batches = check_batches(vlm.processor, "cpu", torch.float32, drawn_picture(), "What is it?")
    return batches["picture and text"]


def move(peft_model, batch):
    """Take one large step."""
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    peft_model.train()
    peft_model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD(trainable, lr=0.5).step()
    return peft_model


def test_float_and_4_bit_starts_share_the_cache(load, monkeypatch) -> None:
    first = attach(load(None))  # float32
    monkeypatch.setattr(layer_file, "minor_svd", None)
    second = attach(load())
    assert recall(first).fingerprint == recall(second).fingerprint
    for name in recall(first).modules:
        pairs = zip(factors(first, name, ANCHOR), factors(second, name, ANCHOR), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("init", ["olora", "lora", "pissa"])
def test_other_methods_know_the_float_base_again(load, tmp_path: Path, init: str) -> None:
    vlm = load()
    peft_model = move(attach(vlm, init=init), example(vlm))
    assert recall(peft_model).residual == ("anchor" if init == "lora" else "subtract")
    folder = save_adapter(peft_model, tmp_path / "a", base=vlm.path)
    again = load()
    loaded = load_adapter(again.model, folder, trainable=True, weights=again.float_weights)
    assert recall(loaded) == recall(peft_model)
    batch = example(vlm)
    assert torch.equal(compute_logits(loaded, batch), compute_logits(peft_model, batch))
    load_adapter(load(None).model, folder)


def test_several_adapters_rest_on_one_4_bit_base(load, tmp_path: Path) -> None:
    vlm, batch = load(), example(load())
    for index, name in enumerate(("one", "two")):
        peft_model = attach(load(), r=2 + index)
        save_adapter(move(peft_model, batch), tmp_path / name, base=vlm.path)
    weights = vlm.float_weights
    peft_model = load_adapter(
        vlm.model, tmp_path / "one", residual="anchor", weights=weights, adapter_name="one"
    )
    before = compute_logits(peft_model, batch)
    with pytest.raises(ValueError, match="made on other weights"):
        add_adapter_from(peft_model, tmp_path / "two", "two")
    add_adapter_from(peft_model, tmp_path / "two", "two", weights=weights)
    assert not torch.equal(compute_logits(peft_model, batch), before)
    use_adapter(peft_model, "one")
    assert torch.equal(compute_logits(peft_model, batch), before)


@pytest.mark.parametrize("correction", ["none", "low_rank"])
def test_exports_of_a_4_bit_residual(load, tmp_path: Path, correction: str) -> None:
    vlm = load()
    batch = example(vlm)
    peft_model = move(attach(vlm, quantization_correction=correction), batch)
    save_adapter(peft_model, tmp_path / "adapter", base=vlm.path, processor=vlm.processor)
    live = compute_logits(peft_model, batch)
    exported = export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", dtype=torch.float32)
    assert all(check.passed for check in exported.checks)
    distance = {}
    for onto in ("original", "dequantized"):
        out = tmp_path / onto
        export_adapter(tmp_path / "adapter", out, "merged", merge_onto=onto, dtype=torch.float32)
        merged = load_vlm(out, dtype=torch.float32, prompt_style="chatml").model
        distance[onto] = float((compute_logits(merged, batch) - live).abs().max())
    assert distance["dequantized"] < 1e-4  # the very weights that were trained on
    assert distance["original"] > 10 * distance["dequantized"]


def test_text_models_are_quantized_but_for_the_head(tmp_path: Path) -> None:
    tokenizer = build_byte_level()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    build_llama(tokenizer, **sizes, initializer_range=0.2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vlm = load_vlm(tmp_path, dtype=torch.float32, quantization="nf4", prompt_style="chatml")
    linears = {
        name: is_quantized(module.weight)
        for name, module in vlm.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(linears) == 15
    assert [name for name, quantized in linears.items() if not quantized] == ["lm_head"]
    assert recall(attach(vlm)).residual == "subtract"


UNLIKE = {
    "minor": {"r": 4},
    "wide": {"r": 6, "init": "pissa", "target_modules": r".*language_model.*(q|down)_proj"},
    "plain": {"r": 3, "init": "rslora", "lora_alpha": 6, "train_projector": False},
    "thin": {"r": 2, "init": "mica", "target_modules": r".*language_model.*v_proj"},
}


def test_unlike_adapters_leave_the_4_bit_base_as_it_was(load, tmp_path: Path) -> None:
    batch, alone = example(load()), {}
    for name, settings in UNLIKE.items():
        vlm = load()
        save_adapter(move(attach(vlm, **settings), batch), tmp_path / name, base=vlm.path)
        base = load()
        how = {"residual": "anchor", "weights": base.float_weights}
        alone[name] = compute_logits(load_adapter(base.model, tmp_path / name, **how), batch)
    vlm = load()
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    unadapted = compute_logits(vlm.model, batch)
    how = {"residual": "anchor", "weights": vlm.float_weights}
    model = load_adapter(vlm.model, tmp_path / "minor", adapter_name="minor", **how)
    for name in ("wide", "plain", "thin"):
        add_adapter_from(model, tmp_path / name, name, weights=vlm.float_weights)
    for name in ("plain", "minor", "thin", "wide", "minor"):
        use_adapter(model, name)
        assert torch.equal(compute_logits(model, batch), alone[name]), name
    for name in ("wide", "thin"):
        use_adapter(model, name, trainable=True)
        move(model, batch)
    remove_adapter(model, "wide")
    use_adapter(model, "plain")
    assert torch.equal(compute_logits(model, batch), alone["plain"])
    base = unload_adapters(model)
    after = base.state_dict()
    assert after.keys() == before.keys()
    # every bit, the scales of the codes included
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert torch.equal(compute_logits(base, batch), unadapted)
