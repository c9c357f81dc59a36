"""Laws of benches asked during training: real questions, the best by their score, also resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_data import write_benches
from safetensors.torch import load_file

from milora_vl.config import DataSection, EvalSection, MiloraConfig, ProjectorSection
from milora_vl.model.load import load_vlm
from milora_vl.stages import finetune_stage
from milora_vl.training.arguments import build_arguments


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_benches(tmp_path)
    records = [
        {
            "image": f"images/bench/p{n % 6}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat <colour> is it?"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for n in range(8)
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path


def finetune(checkpoint: Path, data: Path, run: Path, max_steps: int, **more: Any) -> None:
    section = EvalSection(benches=["vqav2"], data_dir=str(data), during_limit=2, **more)
    training: dict[str, Any] = {
        "max_steps": max_steps, "per_device_train_batch_size": 4, "learning_rate": 0.01,
        "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True, "logging_steps": 2,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    if section.every_steps:
        training |= {"metric_for_best_model": "vqav2", "load_best_model_at_end": True,
                     "greater_is_better": True, "early_stopping_patience": 2}  # fmt: skip
    finetune_stage(
        load_vlm(checkpoint, prompt_style="chatml"),
        MiloraConfig(r=2, lora_dropout=0.2),
        DataSection(train=[str(data / "train.json")], image_folder=str(data)),
        build_arguments(training, run / "checkpoints", 0, section.every_steps),
        run_folder=run,
        projector_section=ProjectorSection(),
        evaluation=section,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def scores(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_vqav2"] for line in lines if "eval_vqav2" in line}


def test_a_bench_chooses_the_best_stops_the_run_and_changes_no_step(
    tiny_checkpoint: Path, data: Path
) -> None:
    whole, stopped, quiet = (data / name for name in ("whole", "stopped", "quiet"))
    finetune(tiny_checkpoint, data, whole, 20, every_steps=2)
    results = json.loads((whole / "eval_during" / "step-2" / "results.json").read_text())
    assert results["benches"]["vqav2"]["n"] == 2
    # this model never says "red": the first score stays the best, and two more end the run
    assert scores(whole) == dict.fromkeys((2, 4, 6), results["benches"]["vqav2"]["score"])
    first, last = (
        weights(whole / "checkpoints/checkpoint-2"),
        weights(whole / "checkpoints/checkpoint-6"),
    )
    delivered = weights(whole)
    assert all(torch.equal(delivered[name], value) for name, value in first.items())
    assert any(not torch.equal(delivered[name], value) for name, value in last.items())

    finetune(tiny_checkpoint, data, stopped, 4, every_steps=2)
    shutil.rmtree(stopped / "adapter")  # as if it had been killed after four steps
    finetune(tiny_checkpoint, data, stopped, 20, every_steps=2)
    assert scores(stopped) == scores(whole)
    again = weights(stopped)
    assert all(torch.equal(again[name], value) for name, value in delivered.items())

    finetune(tiny_checkpoint, data, quiet, 6)  # what a bench draws or switches leaves no trace
    unasked = weights(quiet)
    assert all(torch.equal(unasked[name], value) for name, value in last.items())
