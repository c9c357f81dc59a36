"""Laws of a job in two processes: it measures what one does, and nobody waits for the dead."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from eval_data import write_benches

from milora_vl.config import parse_config
from milora_vl.pipeline import run_pipeline

# Whole jobs one after the other: the packages are imported once a process.
JOB = """
import json, os, signal, sys
from pathlib import Path
from milora_vl.adapter import fingerprint
from milora_vl.config import parse_config
from milora_vl.errors import StoppedError
from milora_vl.pipeline import run_pipeline
from milora_vl.training import trainer

values, run = json.loads(sys.argv[1]), Path(sys.argv[2])
is_last = os.environ["RANK"] == "1"
plain, plain_digest = trainer.token_loss_sum, fingerprint.digest_of
at_step, digests, calls = None, [], []

def watched(model, inputs, **more):
    if model.training and at_step:
        at_step()
    return plain(model, inputs, **more)

def counted(values, rounded_to=None):
    digests.append(1)
    return plain_digest(values, rounded_to)

def stop():
    calls.append(1)
    if len(calls) == 3 and is_last:  # one process alone is asked to stop
        os.kill(os.getpid(), signal.SIGTERM)

def fail():
    if is_last:
        raise MemoryError("no memory is left for a picture")

trainer.token_loss_sum, fingerprint.digest_of = watched, counted
run_pipeline(parse_config(values), run / "whole")
digests.clear()
if is_last:
    (run / "whole" / "eval_after" / "results.json").unlink()
run_pipeline(parse_config(values), run / "whole")  # it reads the adapter
print("digests", len(digests), flush=True)

training = values["training"] | {"max_steps": 9, "eval_on_start": False}
longer = parse_config(values | {"training": training, "eval": {}})
at_step = stop
try:
    run_pipeline(longer, run / "stopped")
except StoppedError as error:
    print(error, flush=True)
at_step = fail
run_pipeline(longer, run / "failed")
"""


def settings(checkpoint: Path, data: Path, batch: int) -> dict[str, dict]:
    return {
        "model": {"path": str(checkpoint), "device": "cpu", "prompt_style": "chatml"},
        "data": {"train": str(data / "train.json"), "validation": str(data / "validation.json"),
                 "image_folder": str(data)},
        "adapter": {"r": 2, "factor_cache": False},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": batch, "per_device_eval_batch_size": 2,
            "disable_tqdm": True, "logging_steps": 1, "eval_on_start": True,
            "learning_rate": 0.01, "optim": "sgd", "save_strategy": "no"},
        "eval": {"benches": ["pope"], "data_dir": str(data), "blind": False, "limit": 4,
                 "every_steps": 2, "during_limit": 2},
    }  # fmt: skip


def start_two(values: dict[str, dict], run: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
              "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", JOB, json.dumps(values), str(run)],
            env=os.environ | shared | {"RANK": str(n), "LOCAL_RANK": str(n)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in range(2)
    ]  # fmt: skip


def write_data(folder: Path) -> None:
    write_benches(folder)
    for name, count in (("train", 8), ("validation", 5)):  # 5 are no equal shares
        records = [
            {"image": f"images/bench/p{n}.png", "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "a fox " * (n % 6 + 1)}]}
            if n < 6 else {"conversations": [
                {"from": "human", "value": "Why?"}, {"from": "gpt", "value": f"{n}"}]}
            for n in range(count)
        ]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(records))


def measured(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def scores(run: Path) -> dict[str, dict]:
    results = json.loads((run / "results.json").read_text())
    return {
        when: {
            name: {key: value for key, value in bench.items() if "second" not in key}
            for name, bench in results[when]["benches"].items()
        }
        for when in ("before", "after")
    }


def test_two_processes_measure_what_one_does_stop_together_and_fail_together(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_data(tmp_path)
    two = start_two(settings(tiny_checkpoint, tmp_path, 2), tmp_path / "two")
    run_pipeline(parse_config(settings(tiny_checkpoint, tmp_path, 4)), tmp_path / "one")
    try:
        outputs, errors = ["", ""], ["", ""]
        outputs[1], errors[1] = two[1].communicate(timeout=480)
        # the other one is in the middle of a step, and ends by itself
        outputs[0], errors[0] = two[0].communicate(timeout=100)
    finally:
        for job in two:
            job.kill()
    assert "MemoryError: no memory is left for a picture" in errors[1], errors[1]
    assert two[0].returncode == 1
    assert "closed by peer" in errors[0], errors[0]
    assert not (tmp_path / "two" / "failed" / "adapter").exists()

    whole = [tmp_path / "one", tmp_path / "two" / "whole"]
    assert scores(whole[1]) == scores(whole[0])
    losses = [measured(run, "validation_loss_nats_per_token") for run in whole]
    # before the first step: both hold the same weights, and each sample counts once
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert 2 in measured(whole[1], "eval_pope")  # the questions were shared and gathered

    # asked in the third step, told to all during the fourth, whose end is saved
    assert all("stopped by SIGTERM; step 4 is saved" in text for text in outputs), outputs
    digests = [int(text.split("digests ")[1].split()[0]) for text in outputs]
    assert digests == [7, 7], "14 layers are digested once, in shares"
