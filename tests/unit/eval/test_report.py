import base64
import io
import json
import os
import re
import shutil

import pytest
from eval_data import write_benches
from eval_models import build_vlm
from PIL import Image
from rich.console import Console

from milora_vl.eval import evaluate, plots
from milora_vl.eval.comparison import compare_runs
from milora_vl.eval.pages import as_percent, change_text, with_interval
from milora_vl.eval.report import print_comparison, print_results, read_comparison, write_report


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with two evaluations of two different models, and a short training log."""
    folder = tmp_path_factory.mktemp("run & <run>")
    data = write_benches(tmp_path_factory.mktemp("data"))
    (data / "manifest.json").write_text('{"name": "StickerVQA"}')
    for seed, name in enumerate(("eval_before", "eval_after")):
        vlm = build_vlm(seed=seed)
        evaluate(vlm, "all", data, folder / name, progress=False, max_new_tokens=2)
    steps = [
        {"stage": "finetune", "step": step, "loss_nats_per_token": 5 - step} for step in (1, 2)
    ]
    steps.append({"stage": "align", "step": 1, "validation_loss_nats_per_token": 2.0})
    text = "".join(json.dumps(step) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text("adapter: {r: 4}  # <b>\n")
    return folder


def printed(function, *args):
    stream = io.StringIO()
    function(*args, console=Console(file=stream, width=200))
    return stream.getvalue()


def test_table_shows_score_interval_blind_and_majority(run_folder):
    results = json.loads((run_folder / "eval_after/results.json").read_text())
    text = printed(print_results, results)
    for bench in results["benches"].values():
        assert with_interval(bench["score"], bench["interval_95"]) in text
        assert with_interval(bench["blind"], bench["blind_interval_95"]) in text
        assert as_percent(bench["majority"]) in text
    assert "StickerVQA (mmbench format)" in text
    results["benches"]["pope"] |= {"note": "first [b]; second", "published": {"full": 85.9}}
    results["benches"]["pope"]["published"]["split"] = "mean F1"
    text = printed(print_results, results)
    for line in (
        "pope: first [b]",
        "pope: second",
        "pope: published for LLaVA-1.5-7B: full 85.9 (m",
    ):
        assert f"\n{line}" in text
    results["model"] = "runs/[/red]a"  # not markup
    assert "runs/[/red]a" in printed(print_results, results)


def test_comparison_shows_both_scores_and_the_change(run_folder):
    comparison = read_comparison(run_folder)
    text = printed(print_comparison, comparison["before"], comparison["after"])
    for name, bench in comparison["after"]["benches"].items():
        old = comparison["before"]["benches"][name]["score"]
        assert f"{100 * (bench['score'] - old):+.1f}" in text
    with_changes = printed(print_comparison, *comparison.values())
    change = comparison["changes"]["pope"]["interval_95"]
    assert f"({100 * change[0]:+.1f} to {100 * change[1]:+.1f})" in with_changes


def test_numbers_as_text():
    assert as_percent(0.6149) == "61.5"
    assert as_percent(None) == "–"
    assert with_interval(0.5, [0.25, 0.75]) == "50.0 (25.0 to 75.0)"
    assert change_text(0.5, 0.25, {"interval_95": [-0.5, 0.01]}) == "-25.0 (-50.0 to +1.0)"
    assert change_text(None, 0.25, None) == "–"


def test_report_is_one_file_with_figures_pictures_and_answers(run_folder):
    path = write_report(run_folder)
    text = path.read_text(encoding="utf-8")
    assert path == run_folder / "report.html"
    assert "http" not in text.replace("http-equiv", "")
    figures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(figures) >= 3  # scores, one bench by category, curves
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert pictures
    for encoded in (*figures, *pictures):
        Image.open(io.BytesIO(base64.b64decode(encoded))).verify()
    assert "before: " in text
    assert "after: " in text
    assert "no image" in text.lower()


def test_report_escapes_what_comes_from_files(run_folder):
    text = write_report(run_folder).read_text(encoding="utf-8")
    assert "What &lt;colour&gt; is it?" in text
    assert "<colour>" not in text
    assert "# &lt;b&gt;" in text
    assert "<run>" not in text


def test_report_of_a_folder_that_holds_little(tmp_path, run_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "Scores" not in write_report(empty).read_text()
    (empty / "metrics.jsonl").write_bytes((run_folder / "metrics.jsonl").read_bytes())
    assert "Training" in write_report(empty).read_text()


def test_report_without_the_data_keeps_the_text(run_folder, tmp_path, caplog):
    text = write_report(run_folder, data_dir=tmp_path).read_text()
    assert "image/jpeg" not in text
    assert "Is there a fox in the image?" in text
    assert "no images of pope" in caplog.text


def test_damaged_files_are_named_in_the_report_and_do_not_fail_it(tmp_path, run_folder):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step":')
    (tmp_path / "certificate.json").write_text("[]")
    text = write_report(tmp_path).read_text()
    assert "Training cannot be shown" in text
    assert "metrics.jsonl line 2" in text
    assert "Init certificate cannot be shown" in text
    for name in ("eval_before", "eval_after"):
        shutil.copytree(run_folder / name, tmp_path / name)
    lines = (tmp_path / "eval_after/predictions.jsonl").read_text().splitlines()[:-1]
    (tmp_path / "eval_after/predictions.jsonl").write_text("\n".join(lines))
    assert "asked different questions" in write_report(tmp_path).read_text()


NAMES = [
    "$",
    "a $ b $",
    "_hidden",
    "<b>",
    "\\frac{",
    "x" * 5000,
    "line\nbreak",
    "",
    "中文",
    "\ud800",
]


def test_no_name_of_a_category_fails_a_report(tmp_path, run_folder):
    for name in ("eval_before", "eval_after"):
        shutil.copytree(run_folder / name, tmp_path / name)
    file = tmp_path / "eval_after/results.json"
    results = json.loads(file.read_text())
    names = NAMES + [f"category {n}" for n in range(200)]
    results["benches"]["pope"]["by_category"] = dict.fromkeys(names, 0.5)
    results["benches"]["vqav2"]["by_category"] = {"a": None, "b": 0.5}
    results["benches"]["mmbench"]["by_category"] = 7
    file.write_text(json.dumps(results))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert f"{len(names) - plots.MOST_BARS} more categories are in results.json" in text
    assert "pope format) by category" in text
    assert "cannot be shown" in text  # mmbench's part, and no other is lost with it
    assert "vqav2 format)</h3>" in text


@pytest.mark.parametrize("name", ["a $ b $", "_<i>[red]", os.fsdecode(b"half \xff"), "x" * 200])
def test_no_name_of_a_run_fails_a_comparison(tmp_path, run_folder, name):
    for place in (name, "other"):
        shutil.copytree(run_folder / "eval_after", tmp_path / place / "eval_after")
        shutil.copy(run_folder / "metrics.jsonl", tmp_path / place)
    # of an adapter that is cut short
    (tmp_path / name / "adapter").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name / "adapter" / file).write_text("{}")
    file = tmp_path / "other/eval_after/results.json"
    results = json.loads(file.read_text())
    results["data_set"] = "[/red] $ \ud800"
    file.write_text(json.dumps(results))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a terminal
    out = tmp_path / "comparison.html"
    changes = compare_runs([tmp_path / "other", tmp_path / name], out, Console(file=stream))
    assert changes["pope"][name]["p_bootstrap"] == 1
    text = out.read_text(encoding="utf-8")
    assert "<i>" not in text
    assert "Throughput, memory and size of the update cannot be shown" in text
    assert text.count("image/png") == 2  # scores and curves


def test_a_figure_without_a_score_is_skipped(tmp_path, run_folder):
    for name in ("eval_before", "eval_after"):
        shutil.copytree(run_folder / name, tmp_path / name)
        results = json.loads((tmp_path / name / "results.json").read_text())
        for bench in results["benches"].values():
            bench |= {"score": None, "interval_95": None, "by_category": {}}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    text = write_report(tmp_path).read_text()
    assert "image/png" not in text
    assert "cannot be shown" not in text
