"""Laws of quantized bases: known by class, never changed, trained through, told apart."""

import pytest
import torch
from quantized_models import build_saved_base
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.quantized import dense_weight, evaluating, is_quantized, stored_values
from milora_vl.adapter.state import MILORA, factors, recall
from milora_vl.config import MiloraConfig
from milora_vl.export.merge import merge_adapter

bnb = pytest.importorskip("bitsandbytes")

NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    return build_saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def load_nf4(saved_base):
    def load():
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
        return LlavaForConditionalGeneration.from_pretrained(
            saved_base, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
        ).eval()

    return load


def layer_of(model):
    return model.model.language_model.layers[0].mlp.up_proj


def test_class_tells_what_the_dtype_hides():
    layer = bnb.nn.Linear4bit(32, 64, bias=False, quant_type="nf4", quant_storage=torch.bfloat16)
    layer = layer.to("cpu")
    assert layer.weight.dtype == torch.bfloat16
    assert is_quantized(layer.weight)
    assert not is_quantized(nn.Linear(4, 4).bfloat16().weight)


def test_float_storage_does_not_hide_4_bits_from_the_initialisation(saved_base, batch):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )
    model = LlavaForConditionalGeneration.from_pretrained(
        saved_base, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).eval()
    assert layer_of(model).weight.is_floating_point()
    _, certificate = attach_milora(model, MiloraConfig(r=8), batch, progress=False)
    assert certificate.residual == "anchor"
    assert {layer.shape for layer in certificate.layers} >= {(64, 64), (128, 64), (64, 128)}
    assert certificate.step0_max_abs_logit_difference < 1e-4


def test_dense_weight_is_near_the_float_weight_and_a_copy(load_nf4, saved_base):
    model = load_nf4()
    original = LlavaForConditionalGeneration.from_pretrained(saved_base, dtype=torch.float32)
    dense, wanted = dense_weight(layer_of(model)), layer_of(original).weight
    assert dense.dtype == torch.float32
    assert 0.01 < (dense - wanted).norm() / wanted.norm() < 0.2
    plain = nn.Linear(4, 4)
    dense_weight(plain).zero_()
    assert plain.weight.abs().max() > 0


def test_identity_survives_a_forward_pass(load_nf4, batch):
    model = load_nf4()
    before = stored_values(layer_of(model)).clone()
    dense = dense_weight(layer_of(model))
    with torch.no_grad():
        model(**batch)  # in eval mode this may re-pack the weights for another kernel
    assert torch.equal(stored_values(layer_of(model)), before)
    after = dense_weight(layer_of(model))
    assert (after - dense).norm() < 0.02 * dense.norm()


def test_measuring_keeps_the_training_layout(load_nf4, batch):
    model = load_nf4()
    modes = [module.training for module in model.modules()]
    with evaluating(model), torch.no_grad():
        model(**batch)
    assert [module.training for module in model.modules()] == modes
    assert not getattr(layer_of(model).weight.quant_state, "packing_format_for_cpu", False)


def test_attach_train_save_load(load_nf4, batch, tmp_path):
    model = load_nf4()
    codes = layer_of(model).weight.data.clone()
    peft_model, certificate = attach_milora(model, MiloraConfig(r=8), batch, progress=False)
    assert certificate.residual == "anchor"
    assert certificate.step0_max_abs_logit_difference < 1e-4
    assert certificate.layers[0].rounding_loss_if_subtracted_ratio is None
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.05)
    peft_model.train()
    for _ in range(2):
        optimizer.zero_grad()
        peft_model(**batch).loss.backward()
        # the first layer learns only if gradients pass the 4-bit layers above it
        assert factors(peft_model, certificate.layers[0].name, MILORA)[0].grad.abs().max() > 0
        optimizer.step()
    live = compute_logits(peft_model, batch)
    save_adapter(peft_model, tmp_path / "a")
    base = load_nf4()
    assert torch.equal(layer_of(base).weight.data, codes)
    loaded = load_adapter(base, tmp_path / "a")
    assert recall(loaded).residual == "anchor"
    assert (compute_logits(loaded, batch) - live).abs().max() < 1e-4
    with pytest.raises(ValueError, match="is quantized"):
        merge_adapter(loaded)


def test_float_copy_of_a_quantized_base_is_another_base(
    load_nf4, saved_base, batch, tmp_path, caplog
):
    peft_model, _ = attach_milora(load_nf4(), MiloraConfig(r=8), progress=False)
    save_adapter(peft_model, tmp_path / "a")

    def load_float():
        return LlavaForConditionalGeneration.from_pretrained(saved_base, dtype=torch.float32)

    with pytest.raises(ValueError, match="made on other weights"):
        load_adapter(load_float(), tmp_path / "a")
    load_adapter(load_float(), tmp_path / "a", strict_base=False)
    assert "made on other weights" in caplog.text
