"""The 7B recipe from its shipped config to its exports, on a tiny model of the same make.

Only paths, sizes and steps differ from ``configs/llava15_7b_*.yaml``. What a GPU would switch on is
set here as far as a CPU allows: TF32 through transformers' own switch, autocast, a loss scaler.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llava15_parts import write_playground, write_stage1
from safetensors.torch import load_file

from milora_vl.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "configs" / "llava15_7b_milora.yaml")
# A sitecustomize of a GPU machine: `tf32: true` is refused by transformers where there is none.
AMPERE = """
import transformers.training_args
transformers.training_args.is_torch_tf32_available = lambda: True
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything the config names, where it names it; TF32 is there to be switched on."""
    folder = tmp_path_factory.mktemp("rehearsal")
    write_playground(folder / "playground" / "data")
    write_stage1(folder / "hub")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(AMPERE)
    kept = torch.backends.fp32_precision
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MILORA_CACHE", str(folder / "cache"))
        patch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
        yield folder
    torch.backends.fp32_precision = kept


def smaller(**more: object) -> list[str]:
    """Overrides: sizes and steps alone. Two samples x 2 micro-batches, four steps, saved at two."""
    values = {
        "adapter.r": 8, "adapter.lora_alpha": 8, "data.max_length": 512, "eval.limit": 2,
        "training.per_device_train_batch_size": 2, "training.global_batch_size": 4,
        "training.save_steps": 2, "training.dataloader_num_workers": 2,
        "model.prepare": "milora-vl convert-llava hub/llava-stage1 --base hub/vicuna "
        "--out checkpoints/llava-1.5-7b-stage1", **more,
    }  # fmt: skip
    return [f"{key.replace('__', '.')}={value}" for key, value in values.items()]


def run_script(folder: Path, words: list[str]) -> subprocess.CompletedProcess:
    """Start the main command as a user does, in the environment that is active."""
    paths = [str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "MILORA_NO_VENV": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    script = ROOT / "scripts" / "finetune_llava_milora.sh"
    command = ["bash", str(script), *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def bf16_run(place: Path) -> Path:
    """The published recipe, started by the script and finished."""
    done = run_script(place, [RECIPE, *smaller()])
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "runs" / "llava15-7b-milora"


def check_run(run: Path, steps: int = 4) -> None:
    """Whole run folder, finite losses, scores before and after, TensorBoard's file."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [one["loss_nats_per_token"] for one in log if "loss_nats_per_token" in one]
    assert len(losses) == steps
    results = json.loads((run / "results.json").read_text())
    assert set(results["after"]["benches"]) == set(results["before"]["benches"]) >= {"pope"}
    assert (run / "report.html").stat().st_size > 0
    assert list(run.rglob("events.out.tfevents.*")), "report_to: tensorboard left no file"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_the_published_recipe_runs_from_the_script_to_its_report(bf16_run: Path) -> None:
    check_run(bf16_run)
    certificate = json.loads((bf16_run / "certificate.json").read_text())
    assert certificate["residual"] == "anchor"
    assert certificate["step0_max_abs_logit_difference"] < 1e-2


def test_an_interrupted_run_goes_on_to_the_same_adapter(bf16_run: Path) -> None:
    file = bf16_run / "adapter" / "adapter_model.safetensors"
    before = file.read_bytes()
    file.parent.rename(bf16_run.parent / "finished-adapter")
    for later in (bf16_run / "checkpoints").glob("checkpoint-4*"):
        later.rename(bf16_run.parent / later.name)  # as if it had ended after step 3
    (bf16_run / "results.json").unlink()
    assert main(["train", RECIPE, *smaller()]) == 0
    assert file.read_bytes() == before
    check_run(bf16_run)
