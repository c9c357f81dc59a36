"""Laws of ``adapter_config.json``: what readers other than PEFT 0.21 need, re-stated here.

None of their packages is a dependency of the tests, so each rule names the file it was read in.
"""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from milora_vl.adapter.attach import attach_milora, compute_logits
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.portable import write_peft_config
from milora_vl.adapter.state import MILORA, factors, recall
from milora_vl.config import MiloraConfig

# Fields of PeftConfigMixin, PeftConfig and LoraConfig in peft 0.10.0 (src/peft/config.py,
# src/peft/tuners/lora/config.py). `from_pretrained` gives every key of the file to the class, so
# another key is a TypeError. 0.13.2, which MiLoRA's authors pin, has all of them too.
KEYS_OF_PEFT_0_10 = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "use_dora",
    "layer_replication",
}  # fmt: skip


def save(model, folder, **settings):
    """Save an adapter that is not at its start; return the folder and the live model."""
    peft_model, _ = attach_milora(model, MiloraConfig(**settings), progress=False)
    generator = torch.Generator().manual_seed(3)
    for name in recall(peft_model).modules:
        for factor in factors(peft_model, name, MILORA):
            factor.data.add_(torch.randn(factor.shape, generator=generator), alpha=0.1)
    return save_adapter(peft_model, folder), peft_model.eval()


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("init", ["milora", "lora", "rslora", "dora", "pissa"])
def test_old_versions_of_peft_know_every_key(make_tiny_vlm, tmp_path, init):
    folder, _ = save(make_tiny_vlm(), tmp_path / "a", init=init, r=4, lora_alpha=8)
    assert set(read_config(folder)) <= KEYS_OF_PEFT_0_10


def test_servers_find_the_keys_they_require(make_tiny_vlm, tmp_path):
    # r=8 is PEFT's default. vLLM (vllm/lora/peft_helper.py, PEFTHelper.from_dict) refuses a file
    # without r, lora_alpha or target_modules; SGLang (srt/lora/lora_config.py) and llama.cpp
    # (convert_lora_to_gguf.py) index these, peft_type and base_model_name_or_path
    folder, _ = save(make_tiny_vlm(), tmp_path / "a", r=4, lora_alpha=4)
    config = read_config(folder)
    assert config["r"] == config["lora_alpha"] == 8
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(recall(load_adapter(make_tiny_vlm(), folder)).modules)
    assert "base_model_name_or_path" in config


@pytest.mark.parametrize(("alpha", "written"), [(8.0, "16"), (8, "16"), (0.25, "0.5")])
def test_a_whole_alpha_is_written_as_an_integer(make_tiny_vlm, tmp_path, alpha, written):
    # Ollama (convert/convert.go, AdapterParameters): `Alpha uint32`, and Go's JSON reader refuses
    # 16.0 for it
    folder, _ = save(make_tiny_vlm(), tmp_path / "a", r=4, lora_alpha=alpha)
    assert f'"lora_alpha": {written},' in (folder / "adapter_config.json").read_text()


def test_rslora_is_saved_as_plain_scaling(make_tiny_vlm, tmp_path, batch):
    # SGLang (srt/lora/lora.py) and llama.cpp (common, adapter.lora.alpha / rank) scale by
    # lora_alpha / r whatever use_rslora says
    folder, live = save(make_tiny_vlm(), tmp_path / "a", init="rslora", r=6, lora_alpha=3)
    config = read_config(folder)
    assert not config.get("use_rslora")
    assert config["lora_alpha"] / config["r"] == pytest.approx(3 / math.sqrt(6), rel=1e-15)
    expected = compute_logits(live, batch)
    stock = PeftModel.from_pretrained(make_tiny_vlm(), folder)
    assert_close(compute_logits(stock, batch), expected, atol=7e-6, rtol=0)
    loaded = load_adapter(make_tiny_vlm(), folder)
    assert torch.equal(compute_logits(loaded, batch), expected)


def test_rslora_saved_before_with_its_flag_loads_bit_for_bit(make_tiny_vlm, tmp_path, batch):
    folder, live = save(make_tiny_vlm(), tmp_path / "a", init="rslora", r=6, lora_alpha=3)
    values = {**read_config(folder), "use_rslora": True, "lora_alpha": 3.0}
    values = {**LoraConfig().to_dict(), **values}  # all keys, as PEFT itself writes them
    (folder / "adapter_config.json").write_text(json.dumps(values, default=list))
    loaded = load_adapter(make_tiny_vlm(), folder)
    assert torch.equal(compute_logits(loaded, batch), compute_logits(live, batch))
    before = load_file(folder / "adapter_model.safetensors")
    again = load_file(save_adapter(loaded, tmp_path / "b") / "adapter_model.safetensors")
    assert before.keys() == again.keys()
    assert all(torch.equal(before[key], again[key]) for key in before)


def test_keys_that_are_not_at_their_defaults_stay(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["a"], rank_pattern={"b": 2}, use_dora=True, init_lora_weights=False
    )
    write_peft_config(tmp_path, config)
    assert LoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
