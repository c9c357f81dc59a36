"""Laws of what is refused: merged, non-finite and incomplete models never pass as whole ones."""

# ruff: noqa: N806 - lora_A, lora_B as in PEFT

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from milora_vl import (
    MiloraConfig,
    attach_milora,
    load_adapter,
    load_vlm,
    merge_adapter,
    save_adapter,
)
from milora_vl.adapter.checkpoint import unload_adapters
from milora_vl.adapter.portable import check_whole
from milora_vl.adapter.state import factors, recall
from milora_vl.model.load_errors import LoadError


def attached(model, residual="anchor"):
    config = MiloraConfig(r=4, residual=residual, factor_cache=False)
    return attach_milora(model, config, progress=False)[0]


@pytest.mark.parametrize("residual", ["anchor", "subtract"])
def test_a_model_that_peft_has_merged_is_told(tiny_vlm, residual):
    peft_model = attached(tiny_vlm, residual)
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged milora.*unmerge_adapter"):
        merge_adapter(peft_model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        unload_adapters(peft_model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_neither_saved_nor_merged(tiny_vlm, tmp_path, value):
    peft_model = attached(tiny_vlm)
    name = recall(peft_model).modules[0]
    factors(peft_model, name, "milora")[0].data[0, 0] = value
    with pytest.raises(ValueError, match=rf"{name}.*NaN or infinite"):
        save_adapter(peft_model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="not finite"):
        merge_adapter(peft_model)


def test_an_overflow_in_float16_is_counted_and_nothing_is_written(tiny_vlm):
    peft_model = attached(tiny_vlm.to(torch.float16))
    name = recall(peft_model).modules[0]
    lora_A, lora_B = factors(peft_model, name, "milora")
    lora_A.data.fill_(0)
    lora_B.data.fill_(0)
    lora_A.data[0, :2], lora_B.data[:3, 0] = 1000.0, 1000.0
    before = {key: value.clone() for key, value in peft_model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"6 merged values.*float16.*{name}"):
        merge_adapter(peft_model)
    assert all(torch.equal(value, before[key]) for key, value in peft_model.state_dict().items())


def test_sharded_parameters_are_refused_before_training(tmp_path):
    model = torch.nn.Linear(2, 2)
    check_whole(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"weight is sharded.*FSDP2"):
            check_whole(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("part", ["multi_modal_projector", "layers.1.self_attn.q_proj", "norm"])
def test_a_checkpoint_that_lacks_weights_is_refused(tiny_checkpoint, tmp_path, part, quantization):
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if part not in key}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks \d+ .*the first is .*"):
        load_vlm(tmp_path, quantization=quantization)


def test_a_stored_factor_that_is_not_finite_is_not_loaded(make_tiny_vlm, tmp_path, monkeypatch):
    folder = save_adapter(attached(make_tiny_vlm()), tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(iter(weights))
    weights[key][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("milora_vl.adapter.checkpoint.check_files", lambda *_: None)
    with pytest.raises(ValueError, match=r"1 of \d+ values are NaN"):
        load_adapter(make_tiny_vlm(), folder)
