"""Laws of QMiLoRA: quantized layer by layer, equal to the slow way, portable, resumable."""

import json

import pytest
import torch
from peft import PeftModel
from quantized_models import build_saved_base, load_float
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlavaForConditionalGeneration

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.quantized import dense_weight, is_quantized
from milora_vl.adapter.state import (
    ANCHOR,
    CORRECTION,
    MILORA,
    factors,
    lora_layer,
    pretrained_function,
    recall,
)
from milora_vl.config import MiloraConfig
from milora_vl.export.merge import merge_adapter
from milora_vl.model.nf4 import build_nf4_config, load_nf4, quantize_nf4
from milora_vl.model.shards import ShardedWeights

bnb = pytest.importorskip("bitsandbytes")
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    return build_saved_base(tmp_path_factory.mktemp("base"), max_shard_size="100KB")


@pytest.fixture
def load(saved_base):
    config = AutoConfig.from_pretrained(saved_base)
    return lambda: load_nf4(str(saved_base), config, dtype=torch.float32)


def attach(load, **settings):
    model, weights = load()
    config = MiloraConfig(**{"r": 8, "train_projector": False, **settings})
    return attach_milora(model, config, progress=False, weights=weights)


def train(peft_model, batch, steps=2):
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.05)
    peft_model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        peft_model(**batch).loss.backward()
        optimizer.step()
    return peft_model


def test_a_streamed_model_is_the_one_transformers_loads(saved_base, load):
    model, weights = load()
    assert len(list(saved_base.glob("*.safetensors"))) > 2
    skip = build_nf4_config(model, torch.float32)
    stock = LlavaForConditionalGeneration.from_pretrained(
        saved_base, quantization_config=skip, dtype=torch.float32, device_map="cpu"
    )
    found, wanted = model.state_dict(), stock.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    quantized = {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantized) == 14
    assert all(".language_model." in name for name in quantized)
    assert model.name_or_path == str(saved_base)
    original = load_float(saved_base)
    for name in quantized:
        assert torch.equal(weights.weight_of(name), original.get_submodule(name).weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_codes_of_one_call(dtype, monkeypatch):
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(3)).to(dtype)
    monkeypatch.setattr("milora_vl.model.nf4.PIECE_VALUES", 64 * 7)
    ours = quantize_nf4(weight)
    stock = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    assert torch.equal(ours.data, stock.data)
    for name, value in stock.quant_state.as_dict().items():
        mine = ours.quant_state.as_dict()[name]
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


def test_keys_of_module_names_and_of_older_layouts_are_both_found(make_tiny_vlm, tmp_path):
    model = make_tiny_vlm()
    model.save_pretrained(tmp_path / "old")
    keys = load_file(tmp_path / "old" / "model.safetensors")
    assert not set(keys) & set(model.state_dict())  # transformers writes the published layout
    (tmp_path / "new").mkdir()
    save_file({k: v.clone() for k, v in model.state_dict().items()},
              tmp_path / "new" / "model.safetensors")  # fmt: skip
    for folder in ("old", "new"):
        weights = ShardedWeights(tmp_path / folder, model)
        assert set(weights) == set(model.state_dict())
        for name, value in model.state_dict().items():
            assert torch.equal(weights.read(name), value)


def test_damaged_and_missing_shards_are_named(saved_base, tmp_path):
    model = load_float(saved_base)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        ShardedWeights(tmp_path, model)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the folder"):
        ShardedWeights(tmp_path, model)
    index = json.loads((saved_base / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = ShardedWeights(tmp_path, model)
    with pytest.raises(FileNotFoundError, match="copy the checkpoint"):
        weights.read("lm_head.weight")
    (tmp_path / index["weight_map"]["language_model.lm_head.weight"]).write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged"):
        weights.read("lm_head.weight")
    with pytest.raises(KeyError, match="of its own"):
        weights.read("no.such.weight")


def test_streamed_residual_equals_subtracting_in_float_and_quantizing(saved_base, load):
    peft_model, certificate = attach(load)
    plain, _ = attach_milora(
        load_float(saved_base), MiloraConfig(r=8, train_projector=False), progress=False
    )
    assert recall(peft_model).residual == certificate.residual == "subtract"
    for layer in certificate.layers:
        for adapter in (MILORA, ANCHOR):
            pairs = zip(factors(peft_model, layer.name, adapter),
                        factors(plain, layer.name, adapter), strict=True)  # fmt: skip
            assert all(torch.equal(a, b) for a, b in pairs)
        residual = lora_layer(plain, layer.name).get_base_layer().weight.detach()
        base_layer = lora_layer(peft_model, layer.name).get_base_layer()
        assert torch.equal(base_layer.weight.data, quantize_nf4(residual).data)
        original = load_float(saved_base).get_submodule(layer.name).weight
        noise = (dense_weight(base_layer) - residual).norm() / original.norm()
        assert layer.quantization_error_ratio == pytest.approx(noise.item(), rel=1e-3)
    assert recall(peft_model).fingerprint == recall(plain).fingerprint


def test_training_passes_the_residual_and_leaves_it(load, batch):
    peft_model, certificate = attach(load)
    base_layer = lora_layer(peft_model, certificate.layers[0].name).get_base_layer()
    before = base_layer.weight.data.clone()
    train(peft_model, batch)
    assert factors(peft_model, certificate.layers[0].name, MILORA)[0].grad.abs().max() > 0
    assert torch.equal(base_layer.weight.data, before)


def test_saved_adapter_is_a_plain_lora_on_the_original_float_base(
    saved_base, load, batch, tmp_path
):
    peft_model = train(attach(load)[0], batch)
    folder = save_adapter(peft_model, tmp_path / "a")
    stock = PeftModel.from_pretrained(load_float(saved_base), folder)
    expected = load_float(saved_base)
    for name in recall(peft_model).modules:
        a, b = factors(peft_model, name, MILORA)
        a0, minus_b0 = factors(peft_model, name, ANCHOR)
        expected.get_submodule(name).weight.data += (b @ a + minus_b0 @ a0).detach()
    wanted = compute_logits(expected, batch)
    torch.testing.assert_close(compute_logits(stock, batch), wanted, **CLOSE)
    merged = merge_adapter(load_adapter(load_float(saved_base), folder))
    torch.testing.assert_close(compute_logits(merged, batch), wanted, **CLOSE)
    live = compute_logits(peft_model, batch)
    assert (live - wanted).norm() < 0.5 * wanted.norm()  # apart by the noise of 4 bits


def test_resume_rebuilds_the_residual_from_the_saved_start(load, batch, tmp_path):
    peft_model = train(attach(load)[0], batch)
    folder = save_adapter(peft_model, tmp_path / "a")
    model, weights = load()
    loaded = load_adapter(model, folder, trainable=True, weights=weights)
    assert recall(loaded) == recall(peft_model)
    found, wanted = loaded.state_dict(), peft_model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    for each in (train(peft_model, batch), train(loaded, batch)):
        each.eval()
    assert torch.equal(compute_logits(loaded, batch), compute_logits(peft_model, batch))


def test_low_rank_correction_brings_the_start_nearer_and_stays_out_of_the_file(
    saved_base, load, batch, tmp_path
):
    wanted = compute_logits(load_float(saved_base), batch)
    plain, before = attach(load)
    peft_model, after = attach(load, quantization_correction="low_rank")
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new.reconstruction_error_ratio < 0.9 * old.reconstruction_error_ratio
        assert new.quantization_error_ratio == old.quantization_error_ratio
        layer = lora_layer(peft_model, new.name)
        a, b = factors(peft_model, new.name, CORRECTION)
        a0, minus_b0 = factors(peft_model, new.name, ANCHOR)
        start = dense_weight(layer.get_base_layer()) + b @ a - minus_b0 @ a0
        original = load_float(saved_base).get_submodule(new.name).weight
        found = float(((start - original).norm() / original.norm()).detach())
        assert new.reconstruction_error_ratio == pytest.approx(found, rel=1e-3)
    distances = [(compute_logits(m, batch) - wanted).norm() for m in (peft_model, plain)]
    assert distances[0] < distances[1]
    with pretrained_function(peft_model):
        restored = compute_logits(peft_model, batch)
    assert (restored - wanted).norm() < 1.01 * distances[0]
    train(peft_model, batch)
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any(CORRECTION in name or ANCHOR in name for name in trainable)
    folder = save_adapter(peft_model, tmp_path / "a")
    shapes = {tuple(v.shape) for v in load_file(folder / "adapter_model.safetensors").values()}
    assert {min(shape) for shape in shapes} == {16}  # 2 r, without the correction
    model, weights = load()
    loaded = load_adapter(model, folder, trainable=True, weights=weights)
    assert recall(loaded) == recall(peft_model)
    assert torch.equal(compute_logits(loaded, batch), compute_logits(peft_model, batch))
    load_adapter(load_float(saved_base), folder)  # the float base needs no correction


def test_a_correction_without_a_4_bit_residual_is_refused(saved_base, load):
    settings = MiloraConfig(r=8, quantization_correction="low_rank")
    with pytest.raises(ValueError, match="there is none"):
        attach_milora(load_float(saved_base), settings, progress=False)
    with pytest.raises(ValueError, match="there is none"):
        attach_milora(load()[0], settings, progress=False)


def test_without_float_weights_a_4_bit_base_is_another_base(load, tmp_path):
    folder = save_adapter(attach(load)[0], tmp_path / "a")
    with pytest.raises(ValueError, match=r"weights=vlm\.float_weights"):
        load_adapter(load()[0], folder)
    with pytest.raises(ValueError, match=r"weights=vlm\.float_weights"):
        attach_milora(load()[0], MiloraConfig(r=8, residual="subtract"), progress=False)


@pytest.mark.parametrize("init", ["milora", "olora", "lora"])
def test_a_bad_weight_on_disk_is_named_and_the_base_stays(load, init):
    model, weights = load()
    name = "model.language_model.layers.1.mlp.up_proj"
    codes = model.get_submodule(name).weight.data.clone()
    read = weights.weight_of

    class Broken:
        def weight_of(self, module, **options):
            return read(module).fill_(torch.nan) if module == name else read(module)

    config = MiloraConfig(r=8, init=init)
    with pytest.raises(ValueError, match=f"{name}: 8192 of 8192 values are NaN"):
        attach_milora(model, config, progress=False, weights=Broken())
    assert is_quantized(model.get_submodule(name).weight)
    assert torch.equal(model.get_submodule(name).weight.data, codes)


def test_noise_above_the_slice_is_warned_about(load):
    _, certificate = attach(load, r=1)
    assert any("4-bit noise is larger than the slice" in text for text in certificate.warnings)
    _, certificate = attach(load, r=32, slice="principal")
    assert not any("4-bit noise" in text for text in certificate.warnings)
    assert "NF4/W" in certificate.summary()
