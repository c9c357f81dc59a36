"""Laws of a QMiLoRA run: trained and resumed through the pipeline; stored 4 bits are anchored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import bind

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter
from milora_vl.adapter.portable import read_milora_file
from milora_vl.adapter.quantized import is_quantized
from milora_vl.adapter.state import lora_layer, recall
from milora_vl.config import MiloraConfig, ModelSection, ProjectorSection, parse_config
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.records import Conversation, Turn
from milora_vl.model.load import VLM, LoadError, load_vlm
from milora_vl.pipeline import run_pipeline
from milora_vl.training.arguments import build_arguments
from milora_vl.training.inputs import build_collate, load_model
from milora_vl.training.run import finetune

pytest.importorskip("bitsandbytes")


@pytest.fixture
def load(whole_checkpoint: Path):
    section = ModelSection(
        path=str(whole_checkpoint),
        dtype="float32",
        quantization="nf4",
        device="cpu",
        prompt_style="chatml",
    )
    return lambda: load_model(section)


@pytest.fixture
def dataset(load, tmp_path: Path) -> ConversationDataset:
    from PIL import Image

    vlm = load()
    conversations = []
    for index in range(6):
        Image.new("RGB", (30, 30), (index * 30, 50, 90)).save(tmp_path / f"{index}.png")
        turns = (Turn("user", "<image>\nHow many?"), Turn("assistant", f"It is {index}."))
        conversations.append(Conversation(str(index), turns, (f"{index}.png",), f"made[{index}]"))
    return bind(vlm, conversations, tmp_path)


def run(vlm: VLM, dataset: ConversationDataset, folder: Path, steps: int, **adapter: str) -> VLM:
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return finetune(
        vlm,
        MiloraConfig(r=4, **adapter),
        dataset,
        dataset,
        build_arguments(settings, folder / "checkpoints", 0),
        run_folder=folder,
        projector=ProjectorSection(learning_rate=1e-3),
    )


@pytest.mark.parametrize("correction", ["none", "low_rank"])
def test_a_run_trains_in_4_bits_and_goes_on_where_it_stopped(
    load, dataset: ConversationDataset, tmp_path: Path, correction: str
) -> None:
    adapter = {"quantization_correction": correction}
    whole = run(load(), dataset, tmp_path / "whole", 4, **adapter)
    state = recall(whole.model)
    assert (state.residual, state.quantization_correction) == ("subtract", correction)
    layer = lora_layer(whole.model, state.modules[0])
    assert is_quantized(layer.get_base_layer().weight)
    run(load(), dataset, tmp_path / "stopped", 2, **adapter)
    (tmp_path / "stopped" / "adapter" / "milora.json").unlink()  # as if stopped before the end
    run(load(), dataset, tmp_path / "stopped", 4, **adapter)
    paths = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole",
             "stopped")]  # fmt: skip
    wanted, found = map(load_file, paths)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    first = load_file(tmp_path / "whole/checkpoints/checkpoint-2/adapter/adapter_model.safetensors")
    assert any(not torch.equal(value, first[name]) for name, value in wanted.items())

    batch = build_collate(whole)([dataset[0], dataset[1]])
    again = run(load(), dataset, tmp_path / "whole", 4, **adapter)  # finished: only loaded
    with torch.no_grad():
        live, loaded = (vlm.model.train()(**batch).logits for vlm in (whole, again))
    assert torch.equal(live, loaded)


def test_a_checkpoint_stored_in_4_bits_is_anchored(load, tmp_path: Path) -> None:
    vlm = load()
    vlm.model.save_pretrained(tmp_path / "nf4")
    vlm.processor.save_pretrained(tmp_path / "nf4")
    stored = load_vlm(tmp_path / "nf4", prompt_style="chatml")
    assert stored.float_weights is None
    for name, value in vlm.model.state_dict().items():
        assert torch.equal(value, stored.model.state_dict()[name]), name
    peft_model, certificate = attach_milora(stored.model, MiloraConfig(r=4), progress=False)
    assert recall(peft_model).residual == certificate.residual == "anchor"
    with pytest.raises(LoadError, match="stored quantized"):
        load_vlm(tmp_path / "nf4", quantization="nf4", prompt_style="chatml")


def test_a_run_in_4_bits_serves_the_float_model(
    load, whole_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    run(load(), dataset, tmp_path, 2)
    vlm = load_vlm(whole_checkpoint, dtype=torch.float32, prompt_style="chatml")
    assert recall(load_adapter(vlm.model, tmp_path / "adapter")).residual == "subtract"


def test_stage_1_aligns_in_float_and_stage_2_trains_in_4_bits(
    whole_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    records = [
        {
            "id": item.id,
            "image": item.images[0],
            "conversations": [
                {"from": "human", "value": item.turns[0].text},
                {"from": "gpt", "value": item.turns[1].text},
            ],
        }
        for item in dataset.conversations
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    few_steps = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    values = {
        "model": {
            "path": str(whole_checkpoint), "dtype": "float32", "device": "cpu",
            "prompt_style": "chatml", "quantization": "nf4",
        },
        "data": {"train": str(tmp_path / "train.json"), "image_folder": str(tmp_path)},
        "alignment": {"patch_steps": 0, "training": {**few_steps, "learning_rate": 0.1}},
        "adapter": {"r": 4},
        "training": few_steps,
        "eval": {"benches": []},
    }  # fmt: skip
    results = run_pipeline(parse_config(values), tmp_path / "run")
    before, aligned = (
        load_vlm(path, prompt_style="chatml").model.state_dict()
        for path in (whole_checkpoint, results["base"])
    )
    moved = {name for name, value in aligned.items() if not torch.equal(value, before[name])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)
    facts = read_milora_file(tmp_path / "run" / "adapter")
    assert facts.base["quantized"] == "Params4bit"
    assert (facts.residual, facts.base["name_or_path"]) == ("subtract", str(results["base"]))
    base = load_vlm(results["base"], dtype=torch.float32, prompt_style="chatml")
    load_adapter(base.model, tmp_path / "run" / "adapter")
