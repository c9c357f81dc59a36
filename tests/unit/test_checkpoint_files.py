"""Laws of writing an adapter folder: whole or as it was, whatever fails, and never over others."""

import resource

import pytest

from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.adapter.milora import attach_milora
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
