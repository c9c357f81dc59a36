"""The main job end to end on a tiny random model and drawn pictures; then what hangs on it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_prep.stickervqa import build_stickervqa
from milora_vl import stages
from milora_vl.cli import STOPPED, main
from milora_vl.config import load_config
from milora_vl.eval.comparison import read_runs
from milora_vl.pipeline import run_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def drawn_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "drawn"
    build_stickervqa(folder, n_train_pictures=24, allow_fetch=False, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def config_file(
    tiny_checkpoint: Path, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = {
        "model": {
            "path": str(tiny_checkpoint),
            "dtype": "float32",
            "device": "cpu",
            "prompt_style": "chatml",
        },
        "data": {
            "train": str(drawn_data / "train.json"),
            "image_folder": str(drawn_data),
            "validation": str(drawn_data / "val.json"),
            "max_length": 512,
            "limit": 24,
        },
        "alignment": {
            "train": [str(drawn_data / "captions.json")],
            "patch_steps": 5,
            "patch_pictures": 8,
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"},
        },
        "adapter": {"r": 4},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "bf16": "auto",
        },
        "eval": {
            "benches": ["mmbench", "pope", "vqav2"],
            "data_dir": str(drawn_data),
            "limit": 6,
        },
    }
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def finished_run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setenv("MILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(config_file), "--run-folder", str(folder)]) == 0
    yield folder
    patch.undo()


def test_a_run_folder_holds_everything(finished_run: Path) -> None:
    for name in (
        "config.yaml",
        "certificate.json",
        "environment.json",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/milora.json",
        "eval_before/results.json",
        "eval_before/predictions.jsonl",
        "eval_after/results.json",
    ):
        assert (finished_run / name).stat().st_size > 0, name
    results = json.loads((finished_run / "results.json").read_text())
    assert set(results["timing"]) == {"data", "base", "before", "finetuning", "after"}
    assert all(results["timing"]["finetuning"][key] > 0 for key in ("guessed_s", "seconds"))
    for bench in ("mmbench", "pope", "vqav2"):
        row = results["after"]["benches"][bench]
        assert 0 <= row["interval_95"][0] <= row["score"] <= row["interval_95"][1] <= 1
        assert row["blind"] is not None
        assert row["majority"] is not None
    environment = json.loads((finished_run / "environment.json").read_text())
    assert set(environment["precision"]["training"]["gflops"]) == {"float32", "bfloat16"}
    certificate = json.loads((finished_run / "certificate.json").read_text())
    assert certificate["step0_max_abs_logit_difference"] < 1e-4
    log = [json.loads(line) for line in (finished_run / "metrics.jsonl").open()]
    assert {"align", "finetune"} <= {entry["stage"] for entry in log}


def test_a_run_says_what_it_took_and_what_was_forgotten(finished_run: Path) -> None:
    (run,) = read_runs([finished_run])
    facts, forgotten = run.facts(), run.forgetting()
    assert facts["train_samples_per_second"] > 0
    assert facts["peak_memory_gib"] > 0.05
    low, high = forgotten["text_perplexity_ratio_interval_95"]
    assert low <= forgotten["text_perplexity_ratio"] <= high
    assert "text perplexity ratio" in (finished_run / "report.html").read_text()


def test_a_finished_run_is_not_done_again(finished_run: Path, config_file: Path) -> None:
    file = finished_run / "adapter" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    assert main(["train", str(config_file), "--run-folder", str(finished_run)]) == 0
    assert file.stat().st_mtime_ns == before


def test_two_processes_share_one_run(config_file: Path, tmp_path: Path) -> None:
    """One claims, evaluates and writes; the result is that of a whole run."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words += ["-m", "milora_vl", "train", str(config_file), "--run-folder", str(tmp_path / "run")]
    words += ["eval.benches=[pope]", "training.logging_steps=1"]
    done = subprocess.run(
        words,
        env=os.environ | {"MILORA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1  # the main process alone speaks
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["benches"]["pope"]["n"] > 0
    assert not list((tmp_path / "run").glob("eval_*/answers*"))
    assert (tmp_path / "run" / "adapter" / "milora.json").exists()
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    steps = [one["step"] for one in log if one["stage"] == "finetune" and "grad_norm" in one]
    assert steps == [1, 2, 3, 4]  # each once


def test_benches_show_images_as_training_does(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def caught(get_vlm: Callable, *_: object, **__: object) -> None:
        seen.append(get_vlm().pad_to_square)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "evaluate_stage", caught)
    config = load_config(config_file, ["data.pad_to_square=false", "alignment=null"])
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, tmp_path / "run")
    assert seen == [False]


def test_a_stopped_command_saves_its_step_and_exits_with_143(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    words = ["train", str(config_file), "eval.benches=[]", "training.max_steps=400"]
    words += ["training.save_steps=400", "--run-folder", str(folder)]
    command = subprocess.Popen([sys.executable, "-m", "milora_vl", *words], stderr=subprocess.PIPE)
    log = folder / "metrics.jsonl"
    while command.poll() is None and not (log.exists() and '"finetune"' in log.read_text()):
        time.sleep(0.05)
    command.terminate()
    text = command.communicate(timeout=120)[1].decode()
    assert command.returncode == STOPPED, text
    assert "Traceback" not in text
    (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 0 < step < 400
    assert f"step {step} is saved" in text
    assert not (folder / "adapter").exists()


def test_two_methods_are_trained_and_compared_by_one_command(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    sides = (
        "[{name: lora, adapter: {init: lora}, training: {learning_rate: 1.0e-3}}, {name: milora}]"
    )
    words = ["train", str(config_file), f"compare={sides}", "eval.benches=[pope]"]
    words += ["training.learning_rate=3.0e-4", "--run-folder", str(tmp_path / "both")]
    assert main(words) == 0
    runs = {name: tmp_path / "both" / name for name in ("lora", "milora")}
    rates, orders, bases = [], [], []
    for folder in runs.values():
        config = yaml.safe_load((folder / "config.yaml").read_text())
        rates.append(config["training"]["learning_rate"])
        orders.append((config["seed"], config["data"], config["training"]["max_steps"]))
        adapter = json.loads((folder / "adapter" / "milora.json").read_text())
        bases.append((adapter["base"]["name_or_path"], (folder / "environment.json").exists()))
    assert rates == [1e-3, 3e-4]
    assert orders[0] == orders[1]
    assert bases[0] == bases[1]
    before = [(folder / "eval_before" / "results.json").read_text() for folder in runs.values()]
    assert before[0] == before[1]  # the base was asked once
    page = (tmp_path / "both" / "comparison.html").read_text()
    for part in ("not distinguishable", "update_norm", "Forgetting", "losses over"):
        assert part in page, part


def test_a_run_folder_belongs_to_one_config(
    finished_run: Path, config_file: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["train", str(config_file), "adapter.r=2", "--run-folder", str(finished_run)]
    assert main(words) == 1
    assert "adapter.r was 4, now 2" in capsys.readouterr().err


def test_missing_data_are_named(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ["--run-folder", str(tmp_path / "r")]
    words = ["train", str(config_file), *run, "data.train=nowhere.json"]  # after an option
    assert main(words) == 1
    assert "nowhere.json" in capsys.readouterr().err


def test_eval_command_gives_the_runs_scores(finished_run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    adapter = json.loads((finished_run / "adapter" / "milora.json").read_text())
    words = ["eval", "--bench", "mmbench", "--model", adapter["base"]["name_or_path"]]
    words += ["--adapter", str(finished_run / "adapter"), "--data", config["eval"]["data_dir"]]
    words += ["--limit", "6", "--out", str(tmp_path / "out"), "--device", "cpu"]
    environment = json.loads((finished_run / "environment.json").read_text())
    in_bfloat16 = environment["precision"]["training"]["bf16"]
    words += ["--autocast", "bfloat16" if in_bfloat16 else "none"]
    assert main(words) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())["benches"]["mmbench"]
    first = json.loads((finished_run / "eval_after" / "results.json").read_text())
    assert again["score"] == first["benches"]["mmbench"]["score"]


def test_the_notebook_runs_from_top_to_bottom(finished_run: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = Path(__file__).parents[1] / "scripts" / "image_qa_demo.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    environment = os.environ | {"MILORA_RUN": str(finished_run), "MPLBACKEND": "agg"}
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=environment)
    assert "finetuned" in str(notebook.cells[-1]["outputs"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.benches=[mmbenc]", "mmbenc"),
        ("model.prompt_style=chatm", "chatm"),
        ("adapter.r=33", "r=33 is out of range"),
        ("adapter.target_modules=[q_prj]", "matches no linear layer"),
        ("compare=[{name: a}, {name: b, adapter: {r: 33}}]", "r=33 is out of range"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_loaded(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str
) -> None:
    for verb in (["check"], ["train", "--run-folder", str(tmp_path / "run")]):
        assert main([verb[0], str(config_file), override, *verb[1:]]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_data(
    finished_run: Path, config_file: Path, drawn_data: Path, capsys: pytest.CaptureFixture
) -> None:
    manifest = drawn_data / "manifest.json"
    before = manifest.read_text(encoding="utf-8")
    try:
        manifest.write_text(json.dumps({**json.loads(before), "seed": 1}), encoding="utf-8")
        assert main(["train", str(config_file), "--run-folder", str(finished_run)]) == 1
        assert "another data set" in capsys.readouterr().err
    finally:
        manifest.write_text(before, encoding="utf-8")


def test_the_adapter_names_the_base_it_is_asked_on(
    finished_run: Path, drawn_data: Path, capsys: pytest.CaptureFixture
) -> None:
    picture = next((drawn_data / "images" / "val").glob("*.png"))
    words = ["ask", str(picture), "What is it?", "--adapter", str(finished_run / "adapter")]
    assert main([*words, "--max-new-tokens", "2"]) == 0
    assert main(["ask", str(picture), "What is it?"]) == 1
    assert "--model" in capsys.readouterr().err
