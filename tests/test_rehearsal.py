"""The 7B recipe from its shipped config to its exports, on a tiny model of the same make.

Only paths, sizes and steps differ from ``configs/llava15_7b_*.yaml``. What a GPU would switch on is
set here as far as a CPU allows: TF32 through transformers' own switch, autocast, a loss scaler.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from llava15_parts import write_playground, write_stage1
from safetensors.torch import load_file

from milora_vl.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
RECIPE, IN_4_BITS = (
    str(ROOT / "configs" / name) for name in ("llava15_7b_milora.yaml", "llava15_7b_qmilora.yaml")
)
# What `tf32: true` sets on a GPU; on a CPU the key does nothing, so a sitecustomize sets it.
TF32 = """
import torch
torch.backends.fp32_precision = "tf32"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything the config names, where it names it; TF32 is there to be switched on."""
    folder = tmp_path_factory.mktemp("rehearsal")
    write_playground(folder / "playground" / "data")
    write_stage1(folder / "hub")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(TF32)
    kept = torch.backends.fp32_precision
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MILORA_CACHE", str(folder / "cache"))
        torch.backends.fp32_precision = "tf32"
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


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    """Run a verb at its defaults and return what it printed; it must succeed."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    seen = capsys.readouterr()
    assert code == 0, seen.err
    return seen.out


FORMS = (("lora",), ("lora-small", "--rank", 4), ("merged",))
# what an adapter of a 4-bit base is merged onto is the user's choice; there is no default
FORMS_IN_4_BITS = (
    *FORMS[:2], ("merged", "--merge-onto", "original"), ("merged", "--merge-onto", "dequantized"),
)  # fmt: skip


def check_every_verb(
    run: Path, capsys: pytest.CaptureFixture, picture: Path, forms: Sequence[tuple] = FORMS
) -> None:
    """Ask and evaluate with the adapter, export in every form: nothing given but the folders."""
    adapter = run / "adapter"
    words = ["ask", picture, "What is it?", "--adapter", adapter, "--max-new-tokens", 3]
    printed(capsys, *words)
    data = Path("playground/data/eval")
    words = ["eval", "--bench", "pope", "--adapter", adapter, "--data", data]
    printed(capsys, *words, "--out", run.parent / f"{run.name}-eval", "--limit", 2)
    again = json.loads((run.parent / f"{run.name}-eval" / "results.json").read_text())
    assert again["benches"]["pope"]["n"] > 0
    for name, *words in forms:
        out = run.parent / f"{run.name}-{name}"
        printed(capsys, "export", run, "--form", name, "--out", out, *words)
        assert any(out.glob("*.safetensors")), name
        shutil.rmtree(out)


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


def test_every_verb_takes_the_finished_run_at_its_defaults(
    bf16_run: Path, place: Path, capsys: pytest.CaptureFixture
) -> None:
    check_every_verb(bf16_run, capsys, next(place.rglob("coco/**/*.jpg")))


def test_the_4_bit_recipe_goes_the_same_way(
    bf16_run: Path, place: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    assert main(["train", IN_4_BITS, *smaller(training__save_strategy="'no'")]) == 0
    run = place / "runs" / "llava15-7b-qmilora"
    check_run(run)
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["residual"] == "subtract"
    check_every_verb(run, capsys, next(place.rglob("coco/**/*.jpg")), FORMS_IN_4_BITS)
    printed(capsys, "compare", bf16_run, run, "--out", place / "comparison.html")
    assert (place / "comparison.html").stat().st_size > 0


@pytest.fixture
def loss_scaler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[torch.amp.GradScaler]]:
    """Give accelerate on the CPU what it makes for fp16 on a GPU: autocast and a loss scaler."""
    from accelerate import Accelerator

    made: list[torch.amp.GradScaler] = []
    plain = Accelerator.__init__

    def build(self: Accelerator, *words: object, **named: object) -> None:
        plain(self, *words, **named)
        if self.state.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # overflows at once
            made.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", build)
    return lambda: made


def test_float16_trains_through_the_overflows_of_its_loss_scaler(
    place: Path, capsys: pytest.CaptureFixture, loss_scaler: Callable
) -> None:
    words = smaller(training__bf16="false", training__fp16="true", training__num_train_epochs=10)
    assert main(["check", RECIPE, *words]) == 1  # its bfloat16 weights do not go with it
    assert "model.dtype" in capsys.readouterr().err
    words.append("model.dtype=float16")
    run = place / "runs" / "fp16"
    assert main(["train", RECIPE, *words, "eval.benches=[]", "--run", str(run)]) == 0
    assert loss_scaler()[0].get_scale() < 2.0**20, "no step overflowed: nothing was rehearsed"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    picture = next(place.rglob("coco/**/*.jpg"))
    words = ["ask", picture, "What is it?", "--adapter", run / "adapter", "--max-new-tokens", 3]
    printed(capsys, *words)
