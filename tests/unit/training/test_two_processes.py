"""Laws of training in two processes: what is measured is what one process would measure."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from eval_data import write_benches

JOB = """
import os, signal, sys, json
from pathlib import Path
from transformers import TrainerCallback
from milora_vl.config import DataSection, EvalSection, MiloraConfig, ProjectorSection
from milora_vl.errors import StoppedError
from milora_vl.model.load import load_vlm
from milora_vl.runtime import join_processes, process_count, process_rank
from milora_vl.stages import finetune_stage
from milora_vl.training import trainer
from milora_vl.training.arguments import build_arguments

checkpoint, data, run, steps, stop_at = sys.argv[1:4] + [int(word) for word in sys.argv[4:]]
join_processes()
plain = trainer.token_loss_sum
calls = []

def stopping(model, inputs, **more):
    if model.training:
        calls.append(1)
        # one process alone is asked to stop
        if len(calls) == stop_at and process_rank() == process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
    return plain(model, inputs, **more)

trainer.token_loss_sum = stopping
settings = {
    "max_steps": steps, "per_device_train_batch_size": 4 // process_count(),
    "per_device_eval_batch_size": 2, "disable_tqdm": True, "logging_steps": 1,
    "eval_on_start": True, "learning_rate": 0.01, "optim": "sgd", "save_strategy": "no",
}
section = EvalSection(benches=["pope"], data_dir=data, every_steps=2, during_limit=6)
data_section = DataSection(
    train=[data + "/train.json"], validation=data + "/validation.json", image_folder=data
)
try:
    finetune_stage(
        load_vlm(checkpoint, prompt_style="chatml"),
        MiloraConfig(r=2),
        data_section,
        build_arguments(settings, Path(run) / "checkpoints", 0, section.every_steps),
        run_folder=Path(run),
        projector_section=ProjectorSection(),
        evaluation=section,
    )
except StoppedError as error:
    sys.exit(str(error))
"""


def start(n_processes: int, *words: object) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n_processes),
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", JOB, *map(str, words)],
            env=os.environ | shared | {"RANK": str(n), "LOCAL_RANK": str(n)},
            stderr=subprocess.PIPE, text=True,
        )
        for n in range(n_processes)
    ]  # fmt: skip


def measured(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def test_two_processes_measure_what_one_does_and_stop_together(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_benches(tmp_path)
    for name, count in (("train", 8), ("validation", 5)):  # 5 are no equal shares
        records = [
            {"image": f"images/bench/p{n}.png", "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "a fox " * (n % 6 + 1)}]}
            if n < 6 else {"conversations": [
                {"from": "human", "value": "Why?"}, {"from": "gpt", "value": f"{n}"}]}
            for n in range(count)
        ]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    one = start(1, tiny_checkpoint, tmp_path, tmp_path / "one", 2, 0)
    assert [job.wait(timeout=240) for job in one] == [0], one[0].stderr.read()
    two = start(2, tiny_checkpoint, tmp_path, tmp_path / "two", 9, 3)
    codes = [job.wait(timeout=240) for job in two]
    errors = [job.stderr.read() for job in two]
    # asked in the third step, told to all during the fourth, whose end is saved
    assert codes == [1, 1], errors
    assert all(text.strip().endswith("stopped by SIGTERM; step 4 is saved") for text in errors), (
        errors
    )
    losses = [
        measured(tmp_path / name, "validation_loss_nats_per_token") for name in ("one", "two")
    ]
    # before the first step: both hold the same weights, and each sample counts once
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert 2 in measured(tmp_path / "two", "eval_pope")  # the questions were shared and gathered
