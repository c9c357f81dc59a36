"""Laws of a job of several processes: who is first, who waits, what is exchanged."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from milora_vl.runtime import (
    from_main_process,
    gather_json,
    is_main_process,
    main_process_first,
    process_count,
    use_one_device,
)
from milora_vl.training.arguments import build_arguments

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "configs/llava15_7b_milora.yaml"
JOB = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from milora_vl.runtime import *
dist.init_process_group("gloo")
file = Path(sys.argv[1])
with main_process_first() as is_first:
    if is_first:
        time.sleep(0.5)
        file.write_text("made")
    assert file.read_text() == "made"
assert is_first == is_main_process() == (process_rank() == 0)
mine = {"rank": process_rank(), "text": "\u00e9" * process_rank()}
assert gather_json(mine) == [{"rank": n, "text": "\u00e9" * n} for n in range(3)]
assert from_main_process(mine)["rank"] == 0
if is_main_process():
    time.sleep(0.5)
    file.write_text("done")
wait_for_all()
assert file.read_text() == "done"
"""


def test_the_main_process_comes_first_and_all_hear_of_each_other(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    words = [sys.executable, "-c", JOB, str(tmp_path / "file")]
    jobs = [
        subprocess.Popen(words, env=os.environ | shared | {"RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(3)
    ]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0, 0]


def test_one_process_is_the_main_one_and_waits_for_nobody() -> None:
    with main_process_first() as is_first:
        assert is_first
    assert is_main_process()
    assert process_count() == 1
    assert gather_json({"a": 1}) == [{"a": 1}]
    assert from_main_process(3) == 3


def test_several_gpus_without_a_launcher_are_never_shared_by_one_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with caplog.at_level(logging.WARNING):
        use_one_device("accelerate launch X")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert "accelerate launch X" in caplog.text
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)  # as Transformers sees them
    with pytest.raises(ValueError, match="accelerate launch"):
        build_arguments({}, tmp_path, 0)


@pytest.mark.skipif(os.name == "nt", reason="bash")
@pytest.mark.parametrize(
    ("gpus", "starter"), [(1, "python -m milora_vl"), (2, "accelerate launch")]
)
def test_the_script_starts_one_process_for_each_gpu(
    tmp_path: Path, gpus: int, starter: str
) -> None:
    for name in ("python", "accelerate"):
        fake = tmp_path / name
        fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {gpus} || echo {name} "$@"\n')
        fake.chmod(0o755)
    environment = os.environ | {"MILORA_NO_VENV": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", str(ROOT / "scripts" / "finetune_llava_milora.sh"), RECIPE]
    done = subprocess.run(
        [*words, "adapter.r=8"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].startswith(starter)
    assert done.stdout.endswith(f"-m milora_vl train {RECIPE} adapter.r=8\n")


def test_torchrun_leaves_the_options_of_the_command_alone() -> None:
    torchrun = pytest.importorskip("torch.distributed.run").get_args_parser()
    words = ["train", RECIPE, "--run-folder", "runs/a"]
    found = torchrun.parse_args(["--nproc-per-node", "8", "-m", "milora_vl", *words])
    assert found.training_script_args == words
