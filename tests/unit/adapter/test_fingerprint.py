"""Laws of the fingerprint: it depends on the values alone, on each of them, and costs no copy."""

import logging

import pytest
import torch
from torch import nn

from milora_vl.adapter import decompose
from milora_vl.adapter import fingerprint as module
from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.fingerprint import (
    combine_digests,
    digest_of,
    fingerprint,
    rounded_digests,
    weight_digests,
)
from milora_vl.config import MiloraConfig

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=[1 << 22, 100], ids=["one piece", "several pieces"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(module, "PIECE_VALUES", request.param)


@pytest.fixture
def weight():
    values = torch.randn(17, 61, generator=torch.Generator().manual_seed(0))
    values[3, 5] = 1e-9  # lost in float16, so that its form differs from that of bfloat16
    return values


@pytest.mark.parametrize("stored", DTYPES[:3])
def test_the_same_values_have_the_same_digest_in_every_dtype(pieces, weight, stored):
    values = weight.to(stored)
    wide = [dtype for dtype in DTYPES if torch.equal(values.to(dtype).double(), values.double())]
    assert len(wide) >= 2
    assert len({digest_of(values.to(dtype)) for dtype in wide}) == 1
    assert digest_of(values.t().contiguous().t()) == digest_of(values)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_one_changed_element_changes_the_digest(pieces, weight, dtype):
    values = weight.to(dtype)
    for place in ((0, 0), (8, 30), (16, 60)):
        other = values.clone()
        other[place] = torch.nextafter(other[place], torch.tensor(9.0, dtype=dtype))
        assert digest_of(other) != digest_of(values)
    assert digest_of(values.flip(0)) != digest_of(values)


def test_rounded_forms_are_the_digests_of_the_rounded_weight(pieces, weight):
    forms = weight_digests(weight)
    assert forms == {
        "exact": digest_of(weight),
        "bfloat16": digest_of(weight.bfloat16()),
        "float16": digest_of(weight.half()),
    }
    assert len(set(forms.values())) == 3
    assert forms == rounded_digests(weight, forms["exact"])
    assert weight_digests(weight.half()) == {"exact": digest_of(weight.half())}  # disk has the rest


def test_16_bit_weights_are_hashed_without_a_float32_copy(weight, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("a copy")

    values = weight.bfloat16()
    wanted = digest_of(values)
    monkeypatch.setattr(torch.Tensor, "float", refuse)
    plain = torch.Tensor.to

    def to(tensor, *args, **options):
        assert torch.float32 not in args
        return plain(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    assert digest_of(values) == wanted


def test_a_start_hashes_each_16_bit_weight_once_and_a_load_too(
    make_tiny_vlm, tmp_path, monkeypatch
):
    calls = []
    real = module.digest_of

    def counted(values, rounded_to=None):
        calls.append(rounded_to)
        return real(values, rounded_to)

    monkeypatch.setattr(module, "digest_of", counted)
    monkeypatch.setattr(decompose, "digest_of", counted)
    settings = MiloraConfig(r=3, residual="anchor")
    peft_model, _ = attach_milora(make_tiny_vlm().bfloat16(), settings, progress=False)
    save_adapter(peft_model, tmp_path / "a")
    assert calls == [None] * 14  # for fingerprint and factor cache together
    calls.clear()
    attach_milora(make_tiny_vlm().bfloat16(), settings, progress=False)
    assert calls == [None] * 14
    calls.clear()
    load_adapter(make_tiny_vlm().bfloat16(), tmp_path / "a")
    assert calls == [None] * 14


def test_a_fingerprint_of_an_older_format_is_still_computed():
    model = nn.Sequential(nn.Linear(3, 2))
    older = fingerprint(model, ["0"], older=True)
    assert module.is_older(older)
    assert older == fingerprint(model.double(), ["0"], older=True)
    assert not module.is_older(combine_digests({"0": weight_digests(model[0].weight)}))


def test_a_base_rounded_otherwise_is_recognized_beside_its_checkpoint(
    make_tiny_vlm, tmp_path, caplog
):
    base = make_tiny_vlm()
    base.save_pretrained(tmp_path / "base")
    load = type(base).from_pretrained
    settings = MiloraConfig(r=3, residual="anchor", factor_cache=False)
    low = load(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(attach_milora(low, settings, progress=False)[0], tmp_path / "a")
    with caplog.at_level(logging.WARNING, "milora_vl"):
        load_adapter(load(tmp_path / "base", dtype=torch.float16), tmp_path / "a")
    assert "same base, which was rounded to bfloat16" in caplog.text
    with pytest.raises(ValueError, match=r"trained in bfloat16 and this model is in float16"):
        load_adapter(make_tiny_vlm().half(), tmp_path / "a")  # no checkpoint at hand
    caplog.clear()
    wide = attach_milora(load(tmp_path / "base", dtype=torch.float16), settings, progress=False)[0]
    save_adapter(wide, tmp_path / "b")
    load_adapter(load(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "b")
    # the checkpoint vouches only for a model that holds its values
    changed = load(tmp_path / "base", dtype=torch.float16)
    changed.model.language_model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="made on other weights"):
        load_adapter(changed, tmp_path / "a")
