"""Laws of names: a folder or a hub id, found in the cache without a connection, or one message."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from milora_vl import load_vlm
from milora_vl.adapter.tuned import choose_model, find_adapter, is_adapter, load_tuned
from milora_vl.cli import main
from milora_vl.model.hub import fetch_folder, is_hub_id
from milora_vl.model.load_errors import LoadError


def put_into_cache(monkeypatch, cache: Path, name: str, folder: Path) -> None:
    """Lay a folder out as the hub's client keeps a repository that it fetched."""
    root, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(folder, root / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def plain_adapter(tiny_checkpoint, tmp_path):
    model = load_vlm(tiny_checkpoint).model
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("below", ["", "adapter"])
def test_an_adapter_is_found_by_its_hub_id_without_a_connection(
    plain_adapter, tiny_checkpoint, tmp_path, monkeypatch, below
):
    holder = tmp_path / "repository"
    shutil.copytree(plain_adapter, holder / below)
    put_into_cache(monkeypatch, tmp_path / "cache", "somebody/adapter", holder)
    by_id = load_tuned(None, "somebody/adapter", device="cpu").model
    by_folder = load_tuned(tiny_checkpoint, plain_adapter, device="cpu").model
    names = dict(by_folder.named_parameters())
    assert all(torch.equal(value, names[key]) for key, value in by_id.named_parameters())
    if not below:  # also as --model, where it stands for itself on its base
        assert is_adapter("somebody/adapter")
        assert choose_model("somebody/adapter", None)[0] == str(tiny_checkpoint)


def test_what_is_nowhere_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    (tmp_path / "runs").mkdir()
    started = time.perf_counter()
    for name in ("nobody/nothing", "runs/demo", "./demo", "a/b/c", "demo"):
        words = ["ask", "x.png", "What?", "--adapter", name, "--model", "nobody/base"]
        assert main(words) == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert name.removeprefix("./") in message
        assert ("no such folder" in message) == (name != "nobody/nothing")
    with pytest.raises(LoadError, match="nobody/base: neither a folder here nor found"):
        load_vlm("nobody/base")
    assert time.perf_counter() - started < 15  # transformers alone tries for 25


def test_a_missing_folder_beside_others_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/demo")
    assert is_hub_id("gpt2")
    (tmp_path / "runs").mkdir()
    assert not any(map(is_hub_id, ("runs/demo", "runs", "../x", "a/b/c", "/a/b", "~/a", "a\\b")))
    with pytest.raises(FileNotFoundError, match=r"runs/demo: no such folder"):
        find_adapter("runs/demo")
    with pytest.raises(LoadError, match=r"runs/demo: no such folder.*tower"):
        fetch_folder("runs/demo", ("config.json",), what="tower")
