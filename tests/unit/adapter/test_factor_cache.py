"""Laws of the factor cache: what it serves is what would be computed, and damage is noticed."""

# ruff: noqa: N806 - U, S, Vh as in the paper

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from milora_vl.adapter import decompose as layer_file
from milora_vl.adapter import factor_cache
from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.factor_cache import FactorCache, FactorKey
from milora_vl.adapter.minor_svd import minor_svd
from milora_vl.adapter.state import ANCHOR, MILORA, factors, recall
from milora_vl.cli import main
from milora_vl.config import MiloraConfig


def random_weight(d_out=40, d_in=24):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))


def key_of(slice_name="minor"):
    return FactorKey("0" * 64, (40, 24), slice_name, "auto")


def start(model, **settings):
    return attach_milora(model, MiloraConfig(**{"r": 6, **settings}), progress=False)


def all_factors(peft_model):
    return [
        tensor
        for name in recall(peft_model).modules
        for adapter in (MILORA, ANCHOR)
        for tensor in factors(peft_model, name, adapter)
    ]


@pytest.mark.parametrize("slice_name", ["minor", "principal"])
def test_a_larger_rank_serves_smaller_ones(tmp_path, slice_name):
    weight, cache = random_weight(), FactorCache(tmp_path)
    cache.put(key_of(slice_name), minor_svd(weight, 8, slice=slice_name), {"exact": "a"})
    entry = cache.get(key_of(slice_name), 3)
    assert entry.digests == {"exact": "a"}
    U, S, Vh = entry.triplets
    U3, S3, Vh3 = minor_svd(weight, 3, slice=slice_name)
    torch.testing.assert_close((U * S) @ Vh, (U3 * S3) @ Vh3, atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh, Vh3, atol=1e-4, rtol=0)  # the same signs too
    assert cache.get(key_of(slice_name), 9) is None


@pytest.mark.parametrize("slice_name", ["middle", "random"])
def test_other_slices_serve_their_own_rank_only(tmp_path, slice_name):
    cache = FactorCache(tmp_path)
    cache.put(key_of(slice_name), minor_svd(random_weight(), 8, slice=slice_name))
    assert cache.get(key_of(slice_name), 8) is not None
    assert cache.get(key_of(slice_name), 3) is None


def test_what_is_read_back_is_what_was_stored_bit_for_bit(tmp_path):
    triplets, cache = minor_svd(random_weight(), 8), FactorCache(tmp_path)
    cache.put(key_of(), triplets)
    read = cache.get(key_of(), 8).triplets
    assert all(torch.equal(a, b) for a, b in zip(triplets, read, strict=True))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_damaged_entries_are_dropped_with_a_line_in_the_log(tmp_path, caplog, damage):
    cache = FactorCache(tmp_path)
    cache.put(key_of(), minor_svd(random_weight(), 8))
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes({"cut": data[:-40], "flip": data, "empty": b"", "other": b"text" * 99}[damage])
    with caplog.at_level(logging.WARNING, logger="milora_vl"):
        assert cache.get(key_of(), 8) is None
    assert f"dropped the damaged entry {file.name}" in caplog.text
    assert not file.exists()


def test_second_start_decomposes_nothing_and_is_the_first_bit_for_bit(make_tiny_vlm, monkeypatch):
    fresh, certificate = start(make_tiny_vlm(), factor_cache=False)
    first, first_certificate = start(make_tiny_vlm())
    monkeypatch.setattr(layer_file, "minor_svd", None)
    second, second_certificate = start(make_tiny_vlm())
    for one, two, three in zip(*map(all_factors, (fresh, first, second)), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert certificate.layers == first_certificate.layers == second_certificate.layers
    assert recall(fresh).fingerprint == recall(second).fingerprint


def test_the_certificate_of_cached_factors_is_that_of_the_present_settings(make_tiny_vlm):
    start(make_tiny_vlm(), residual="anchor")
    _, cached = start(make_tiny_vlm(), residual="subtract", lora_alpha=3)
    _, fresh = start(make_tiny_vlm(), residual="subtract", lora_alpha=3, factor_cache=False)
    assert cached.layers == fresh.layers
    assert cached.layers[0].reconstruction_error_ratio > 0


def test_one_changed_value_is_another_weight(make_tiny_vlm, factors_of_this_test):
    start(make_tiny_vlm())
    before = len(list(factors_of_this_test.iterdir()))
    model = make_tiny_vlm()
    model.model.language_model.layers[0].mlp.up_proj.weight.data[3, 3] += 1e-4
    peft_model, _ = start(model)
    assert len(list(factors_of_this_test.iterdir())) == before + 1
    model = make_tiny_vlm()
    model.model.language_model.layers[0].mlp.up_proj.weight.data[3, 3] += 1e-4
    fresh, _ = start(model, factor_cache=False)
    pairs = zip(all_factors(peft_model), all_factors(fresh), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tiny_vlm, monkeypatch, caplog):
    monkeypatch.setattr("milora_vl.adapter.attach.factors_folder", lambda: __file__ + "/x")
    monkeypatch.setattr("milora_vl.adapter.attach.FactorCache", lambda f: FactorCache(Path(f)))
    with caplog.at_level(logging.WARNING, logger="milora_vl"):
        start(tiny_vlm)
    assert "cannot be written" in caplog.text


WRITER = """
import sys
from pathlib import Path
import torch
from milora_vl.adapter.factor_cache import FactorCache, FactorKey
cache, key = FactorCache(Path(sys.argv[1])), FactorKey("0" * 64, (400, 240), "minor", "auto")
triplets = tuple(torch.full(shape, 1.0) for shape in ((400, 80), (80,), (80, 240)))
seen = 0
for i in range(150):
    cache.put(key, triplets, {"exact": str(i)})
    entry = cache.get(key, 80)
    assert entry is not None
    assert all(torch.equal(a, b) for a, b in zip(entry.triplets, triplets))
print("fine")
"""


def test_two_processes_at_once_never_see_half_an_entry(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    pair = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in pair:
        out, err = process.communicate(timeout=120)
        assert out.strip() == "fine", err
        assert "damaged" not in err
    assert len(list(tmp_path.iterdir())) == 1  # no temporary file is left


def test_the_verb_shows_and_clears(tiny_vlm, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    monkeypatch.setattr("milora_vl.adapter.attach.factors_folder", lambda: tmp_path / "factors")
    start(tiny_vlm)
    assert main(["cache", "show"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'factors'}: 14 layers" in shown
    assert "minor, r=6" in shown
    assert main(["cache", "clear"]) == 0
    assert "freed" in capsys.readouterr().out
    assert not list((tmp_path / "factors").iterdir())


def test_damage_in_a_folder_that_is_not_ours_costs_a_line_only(tmp_path, monkeypatch, caplog):
    cache = FactorCache(tmp_path)
    cache.put(key_of(), minor_svd(random_weight(), 4))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.WARNING, logger="milora_vl"):
        assert cache.get(key_of(), 4) is None
    assert "damaged entry" in caplog.text


def test_entries_with_certificates_as_earlier_versions_wrote_them_are_used(
    make_tiny_vlm, factors_of_this_test, monkeypatch
):
    _, first = start(make_tiny_vlm())
    for file in factors_of_this_test.iterdir():
        tensors = load_file(file)
        facts = json.loads(tensors["facts"].numpy().tobytes())
        text = json.dumps({"certificates": {"[6, 1.0]": {"sigma_max": 1.0}}, **facts})
        tensors["facts"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        digest = factor_cache._checksum(tensors)
        tensors["checksum"] = torch.tensor(list(digest), dtype=torch.uint8)
        save_file(tensors, file, {"slice": "minor", "svd": "auto"})
    monkeypatch.setattr(layer_file, "minor_svd", None)  # nothing may be decomposed again
    _, again = start(make_tiny_vlm())
    assert again.layers == first.layers


def test_entries_that_another_process_removes_are_passed_over(tmp_path):
    cache = FactorCache(tmp_path)
    cache.put(key_of(), minor_svd(random_weight(), 4))
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")  # listed, but not there
    assert len(list(cache.entries())) == 1
    assert cache.clear() > 0
    assert not list(cache.entries())
