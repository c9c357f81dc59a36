"""Laws of the form for servers: same logits as the live model, and each server's rules kept.

vLLM and SGLang need a GPU build and are no dependency here; their rules are re-stated, each with
the file it was read in.
"""

import json

import pytest
import torch
from adapters_to_export import CLOSE, example, make_adapter
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from milora_vl.adapter.attach import compute_logits
from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.cli import main
from milora_vl.export.forms import export_adapter
from milora_vl.export.serve import vllm_rank
from milora_vl.model.load import load_vlm


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    return make_adapter(tiny_checkpoint, tmp_path_factory.mktemp("serve") / "run")


def served_logits(base, lora):
    vlm = load_vlm(base)
    return compute_logits(PeftModel.from_pretrained(vlm.model, lora), example(vlm))


def accepted_by_vllm(lora, max_lora_rank):
    """PEFTHelper.validate_legal (vllm/lora/peft_helper.py) and the names that
    parse_fine_tuned_lora_name (vllm/lora/utils.py) takes."""
    config = json.loads((lora / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["r"] <= max_lora_rank
    assert config["bias"] == "none"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    names = load_file(lora / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    assert all(name.startswith("base_model.model.") and name.endswith(ends) for name in names)


def nothing_lost_by_sglang(lora):
    """LoRAAdapter (sglang/srt/lora/lora.py): scaling is lora_alpha / r; tensors go to the layer
    that `layers.N.` names, and what has no such part is kept beside them and never used."""
    config = json.loads((lora / "adapter_config.json").read_text())
    assert config["peft_type"].lower() == "lora"
    assert not config.get("use_rslora")
    names = load_file(lora / "adapter_model.safetensors")
    assert all(".layers." in name for name in names)


def converted_by_llama_cpp(lora):
    """convert_lora_to_gguf.py: another name than lora_A and lora_B ends it; one rank a file, as
    the runtime scales by adapter.lora.alpha / rank."""
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if ".lora_A." in name} == {config["r"]}
    assert {t.shape[1] for name, t in tensors.items() if ".lora_B." in name} == {config["r"]}


def read_by_ollama(lora):
    """AdapterParameters (convert/convert.go): `Alpha uint32`; Go refuses 8.0 for it."""
    text = (lora / "adapter_config.json").read_text()
    assert type(json.loads(text)["lora_alpha"]) is int


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init": "rslora", "r": 3, "lora_alpha": 4},  # alpha * sqrt(r) is not whole
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}},  # servers read one of each
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_base_and_lora_compute_what_was_trained(run, tiny_checkpoint, tmp_path, capsys, settings):
    folder, live = run
    if settings:
        folder, live = make_adapter(tiny_checkpoint, tmp_path / "run", **settings)
    out = tmp_path / "mine"
    assert main(["export", str(folder), "--out", str(out), "--form", "serve"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": ok") == 2
    assert_close(served_logits(out / "base", out / "lora"), live, atol=7e-6, rtol=0)
    assert (served_logits(tiny_checkpoint, out / "lora") - live).abs().max() > 1e-3  # projector
    for rule in (nothing_lost_by_sglang, converted_by_llama_cpp, read_by_ollama):
        rule(out / "lora")
    rank = json.loads((out / "lora" / "adapter_config.json").read_text())["r"]
    accepted_by_vllm(out / "lora", vllm_rank(rank))
    flag = f"--enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules mine={out / 'lora'}"
    assert f"vllm serve {out / 'base'} {flag}" in printed
    assert flag in (out / "README.md").read_text()


def test_the_base_keeps_every_weight_but_the_projector(run, tiny_checkpoint, tmp_path):
    out = export_adapter(run[0], tmp_path / "out", "serve").folder
    before = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(out / "base").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    AutoProcessor.from_pretrained(out / "base")
    vlm = load_vlm(out / "base")  # this package's own loader checks the fingerprint
    loaded = compute_logits(load_adapter(vlm.model, out / "lora"), example(vlm))
    assert_close(loaded, run[1], **CLOSE)
    assert export_adapter(run[0], out, "serve").folder == out  # may be replaced


def test_without_a_trained_projector_the_base_stays_where_it_is(tiny_checkpoint, tmp_path):
    folder, live = make_adapter(tiny_checkpoint, tmp_path / "run", train_projector=False)
    exported = export_adapter(folder, tmp_path / "out", "serve")
    assert not (tmp_path / "out" / "base").exists()
    assert exported.commands[0].startswith(f"vLLM: vllm serve {tiny_checkpoint} ")
    assert_close(served_logits(tiny_checkpoint, tmp_path / "out" / "lora"), live, **CLOSE)


def test_a_smaller_rank_for_servers_says_what_is_cut_off(run, tmp_path):
    exported = export_adapter(run[0], tmp_path / "out", "serve", r=5)
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert "rank 8 -> 5" in exported.notes[0]
    assert "What was cut off" in (tmp_path / "out" / "README.md").read_text()
    assert all(check.tolerance is None for check in exported.checks)


def test_a_dora_is_refused_before_anything_is_loaded(tiny_checkpoint, tmp_path):
    folder, _ = make_adapter(tiny_checkpoint, tmp_path / "run", init="dora")
    with pytest.raises(ValueError, match=r"no server takes a DoRA.*--form merged"):
        export_adapter(folder, tmp_path / "out", "serve")


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (9, 16), (257, 320), (512, 512), (513, None)])
def test_the_rank_flag_of_vllm_is_the_smallest_that_admits_it(rank, flag):
    assert vllm_rank(rank) == flag
