"""Laws of what a training delivers: the best adapter where asked, nothing that is not finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import milora_vl.training.trainer as trainer_module
from milora_vl.config import MiloraConfig, ProjectorSection
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.records import Conversation, Turn
from milora_vl.model.load import load_vlm
from milora_vl.training.arguments import build_arguments
from milora_vl.training.run import finetune
from milora_vl.training.watch import NonFiniteError


@pytest.fixture
def dataset(tiny_checkpoint: Path) -> ConversationDataset:
    vlm = load_vlm(tiny_checkpoint)
    conversations = [
        Conversation(
            str(n), (Turn("user", f"{n}?"), Turn("assistant", f"It is {n}.")), (), f"t[{n}]"
        )
        for n in range(8)
    ]
    return ConversationDataset(conversations, None, None, "chatml", vlm.processor.tokenizer, 0)


def run(
    checkpoint: Path, dataset: ConversationDataset, folder: Path, scores: Any = None, **more: Any
) -> dict[str, torch.Tensor]:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01,
        "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "logging_steps": 1,
    } | more  # fmt: skip
    finetune(
        load_vlm(checkpoint),
        MiloraConfig(r=4),
        dataset,
        None,
        build_arguments(settings, folder / "checkpoints", 0, 1 if scores else None),
        run_folder=folder,
        projector=ProjectorSection(),
        measure=(lambda model, step: {"pope": scores[step]}) if scores else None,
        measure_every=1 if scores else None,
    )
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


BEST = {"metric_for_best_model": "eval_pope", "early_stopping_patience": 2, "save_total_limit": 1,
        "load_best_model_at_end": True, "save_steps": 1, "greater_is_better": True,
        "eval_strategy": "steps", "eval_steps": 1}  # fmt: skip


def test_the_best_by_a_benchs_score_is_delivered_also_after_a_stop(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.4, 5: 1.0}
    whole = run(tiny_checkpoint, dataset, tmp_path / "a", scores, max_steps=5, **BEST)
    kept = sorted((tmp_path / "a" / "checkpoints").glob("checkpoint-*"))
    best = load_file(kept[0] / "adapter" / "adapter_model.safetensors")
    assert kept[0].name == "checkpoint-2"
    assert all(torch.equal(whole[name], best[name]) for name in best)
    assert max(row["step"] for row in lines(tmp_path / "a")) == 4  # stopped before the fifth
    (tmp_path / "a" / "adapter" / "milora.json").unlink()  # as if killed before the last write
    again = run(tiny_checkpoint, dataset, tmp_path / "a", scores, max_steps=5, **BEST)
    assert all(torch.equal(again[name], best[name]) for name in best)


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_step_that_is_not_finite_is_named_and_never_written(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path, monkeypatch, mode: str
) -> None:
    plain, calls = trainer_module.token_loss_sum, []

    def spoiled(model: Any, inputs: Any) -> Any:
        calls.append(1)
        loss, count = plain(model, inputs)
        return (loss * float("nan") if len(calls) == 3 else loss), count

    monkeypatch.setattr(trainer_module, "token_loss_sum", spoiled)
    more = {"on_non_finite": mode, "logging_steps": 500, "save_total_limit": 1}
    if mode == "stop":
        with pytest.raises(NonFiniteError, match=r"step 3, with records t\[\d\], t\[\d\]"):
            run(tiny_checkpoint, dataset, tmp_path, **more)
        assert not (tmp_path / "adapter").exists()
        found = list((tmp_path / "checkpoints").glob("checkpoint-*/adapter/*.safetensors"))
        assert [file.parts[-3] for file in found] == ["checkpoint-2"]
    else:
        found = [tmp_path / "adapter" / "adapter_model.safetensors"]
        run(tiny_checkpoint, dataset, tmp_path, **more)
        assert lines(tmp_path)[-1]["skipped_steps"] == 1
    for value in load_file(found[0]).values():
        assert value.isfinite().all()


def test_a_batch_that_does_not_fit_is_split_and_its_gradient_stays(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path, monkeypatch
) -> None:
    more = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no",
            "train_sampling_strategy": "sequential", "optim": "sgd"}  # fmt: skip
    wanted = run(tiny_checkpoint, dataset, tmp_path / "a", **more)
    plain = trainer_module.token_loss_sum

    def short_of_memory(model: Any, inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, inputs)

    monkeypatch.setattr(trainer_module, "token_loss_sum", short_of_memory)
    found = run(tiny_checkpoint, dataset, tmp_path / "b", auto_find_batch_size=True, **more)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3)


def test_smoothing_seed_and_order_change_the_losses(
    tiny_checkpoint: Path, dataset: ConversationDataset, tmp_path: Path
) -> None:
    seen = []
    choices: list[dict[str, Any]] = [
        {}, {"label_smoothing_factor": 0.5}, {"data_seed": 5},
        {"train_sampling_strategy": "sequential"}, {"train_sampling_strategy": "random"},
    ]  # fmt: skip
    for index, more in enumerate(choices):
        run(
            tiny_checkpoint, dataset, tmp_path / str(index), max_steps=2, save_strategy="no", **more
        )
        rows = [row for row in lines(tmp_path / str(index)) if "loss_nats_per_token" in row]
        seen.append(tuple(row["loss_nats_per_token"] for row in rows))
    assert len(set(seen)) == len(seen)
