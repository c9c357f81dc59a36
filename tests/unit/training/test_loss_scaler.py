"""Laws of float16: overflows of the loss scaler are counted, and end the run if they never stop."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import milora_vl.training.trainer as trainer_module
from milora_vl.config import MiloraConfig, ProjectorSection
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.records import Conversation, Turn
from milora_vl.model.load import load_vlm
from milora_vl.training.arguments import build_arguments
from milora_vl.training.run import finetune
from milora_vl.training.watch import OVERFLOWS_IN_A_ROW, NonFiniteError

SCALE = 2.0**30


@pytest.fixture
def scalers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.amp.GradScaler]]:
    """Give accelerate on the CPU what it makes for fp16 on a GPU: autocast and a loss scaler."""
    made: list[torch.amp.GradScaler] = []
    plain = Accelerator.__init__

    def build(self: Accelerator, *words: object, **named: object) -> None:
        plain(self, *words, **named)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        made.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", build)
    return made


def run(checkpoint: Path, folder: Path, max_steps: int) -> list[dict[str, Any]]:
    vlm = load_vlm(checkpoint)
    turns = (Turn("user", "How many?"), Turn("assistant", "It is four."))
    conversations = [Conversation(str(n), turns, (), f"t[{n}]") for n in range(4)]
    settings = {
        "max_steps": max_steps, "per_device_train_batch_size": 2, "fp16": True, "save_steps": 20,
        "learning_rate": 0.01, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    finetune(
        vlm,
        MiloraConfig(r=2),
        ConversationDataset(conversations, None, None, "chatml", vlm.processor.tokenizer, 0),
        None,
        build_arguments(settings, folder / "checkpoints", 0),
        run_folder=folder,
        projector=ProjectorSection(),
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_overflows_are_counted_also_after_a_stop(
    tiny_checkpoint: Path, tmp_path: Path, scalers: list
) -> None:
    rows = run(tiny_checkpoint, tmp_path, 20)
    skipped = rows[-1]["skipped_steps"]
    assert 0 < skipped < OVERFLOWS_IN_A_ROW
    assert scalers[-1].get_scale() == SCALE / 2**skipped  # each halves it, and none other
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())

    (tmp_path / "adapter" / "milora.json").unlink()  # as if killed before the last write
    assert run(tiny_checkpoint, tmp_path, 22)[-1]["skipped_steps"] == skipped
    assert scalers[-1].get_scale() == SCALE / 2**skipped  # the scale is that of the checkpoint


def test_overflows_at_any_scale_end_the_run(
    tiny_checkpoint: Path, tmp_path: Path, scalers: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer_module.token_loss_sum

    def overflowing(*words: Any, **named: Any) -> Any:
        loss, count = plain(*words, **named)
        return loss * float("inf"), count

    monkeypatch.setattr(trainer_module, "token_loss_sum", overflowing)
    with pytest.raises(NonFiniteError, match="float16 overflowed in 20 steps in a row"):
        run(tiny_checkpoint, tmp_path, 99)
    assert not (tmp_path / "adapter").exists()
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))
