"""Laws of writing an adapter folder: whole or as it was, whatever fails, and never over others."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.state import MILORA, factors, recall
from milora_vl.config import MiloraConfig


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attach(model):
    return attach_milora(model, MiloraConfig(r=6), progress=False)[0]


def change(peft_model):
    """Move the adapter, as training would."""
    for factor in factors(peft_model, recall(peft_model).modules[0], MILORA):
        factor.data.add_(1.0)
    return peft_model


def test_full_disk_leaves_the_old_folder_whole(make_tiny_vlm, tmp_path):
    peft_model = attach(make_tiny_vlm())
    folder = save_adapter(peft_model, tmp_path / "a")
    before = snapshot(folder)
    change(peft_model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r".+"):
            save_adapter(peft_model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # nothing half-written is left
    save_adapter(peft_model, folder)
    assert snapshot(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folder_with_other_files_is_not_replaced(make_tiny_vlm, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        save_adapter(attach(make_tiny_vlm()), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_failed_swap_leaves_the_old_folder_whole(make_tiny_vlm, tmp_path, monkeypatch):
    peft_model = attach(make_tiny_vlm())
    folder = save_adapter(peft_model, tmp_path / "a")
    before = snapshot(folder)

    def refused(temporary, final):
        raise PermissionError(final)

    monkeypatch.setattr("milora_vl.adapter.checkpoint.replace_folder", refused)
    with pytest.raises(PermissionError):
        save_adapter(change(peft_model), folder)
    assert snapshot(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 99),
        ("target_modules", ["q_proj"]),
        ("modules_to_save", None),
        ("use_dora", True),
        ("use_rslora", True),
        ("alpha_pattern", {"q_proj": 3}),
        ("bias", "all"),
    ],
)
def test_edited_peft_configuration_is_refused(make_tiny_vlm, tmp_path, key, value):
    folder = save_adapter(attach(make_tiny_vlm()), tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"{key}=.*one of them was edited, copy the adapter"):
        load_adapter(make_tiny_vlm(), folder)


def test_missing_or_damaged_peft_configuration_is_refused(make_tiny_vlm, tmp_path):
    folder = save_adapter(attach(make_tiny_vlm()), tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        load_adapter(make_tiny_vlm(), folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(make_tiny_vlm(), folder)


def test_rank_that_both_files_agree_on_but_the_tensors_do_not_is_refused(make_tiny_vlm, tmp_path):
    folder = save_adapter(attach(make_tiny_vlm()), tmp_path / "a")
    for name, changes in (
        ("adapter_config.json", {"r": 8, "lora_alpha": 8}),
        ("milora.json", {"r": 4, "lora_alpha": 4.0}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"has shape \[12, .*but r=4 on this model needs \[8, "):
        load_adapter(make_tiny_vlm(), folder)


def test_folder_of_the_first_format_still_loads(make_tiny_vlm, tmp_path):
    peft_model = change(attach(make_tiny_vlm()))
    folder = save_adapter(peft_model, tmp_path / "a")
    path = folder / "milora.json"
    facts = json.loads(path.read_text())
    newer = ("init", "processor", "dtype", "inputs")
    old = {key: facts[key] for key in facts if key not in newer}
    path.write_text(json.dumps({**old, "format_version": 1}))
    assert recall(load_adapter(make_tiny_vlm(), folder)) == recall(peft_model)


def test_a_folder_saved_by_the_first_release_computes_as_before(make_tiny_vlm):
    folder = Path(__file__).parents[2] / "data" / "adapter_format_2"
    expected = load_file(folder / "logits.safetensors")["logits"]
    for residual in ("anchor", "subtract"):
        loaded = load_adapter(make_tiny_vlm(), folder / "adapter", residual=residual)
        with torch.no_grad():
            logits = loaded(input_ids=torch.arange(3, 11)[None]).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_another_architecture_is_refused_by_name(make_tiny_vlm, tmp_path):
    folder = save_adapter(attach(make_tiny_vlm()), tmp_path / "a", base="org/model")
    base = make_tiny_vlm()
    del base.model.language_model.layers[1]
    with pytest.raises(ValueError, match=r"no layer .*7 of 14 are missing.*org/model"):
        load_adapter(base, folder)


def test_a_damaged_key_is_no_riddle(make_tiny_vlm, tmp_path):
    model, _ = attach_milora(make_tiny_vlm(), MiloraConfig(r=3), progress=False)
    folder = save_adapter(model, tmp_path / "a")
    for name, old, new in (
        ("milora.json", '"float16"', '"float17"'),
        ("adapter_config.json", '"LORA"', '"LORB"'),
    ):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        message = rf"(?s){name} is damaged.*copy the adapter folder again"
        with pytest.raises(ValueError, match=message):
            load_adapter(make_tiny_vlm(), folder)
        (folder / name).write_text(text)
    load_adapter(make_tiny_vlm(), folder)
