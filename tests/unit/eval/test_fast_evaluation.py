"""Answers kept across interruptions, text tasks and many runs."""

import json

import pytest
import torch
from eval_data import write_benches
from eval_models import build_vlm
from peft import LoraConfig, get_peft_model
from rich.console import Console

from milora_vl.eval import evaluate
from milora_vl.eval.answering import AnswerJournal, fingerprint_weights
from milora_vl.eval.comparison import compare_runs, mcnemar
from milora_vl.eval.evaluation import JOURNAL
from milora_vl.eval.items import Answer
from milora_vl.eval.text_tasks import run_text_tasks

OPTIONS = {"progress": False, "max_new_tokens": 2}


class Stop(BaseException):
    """Stands for a killed process."""


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_results(tmp_path):
    data = write_benches(tmp_path / "data")
    reference = evaluate(build_vlm(), "all", data, tmp_path / "whole", batch_size=2, **OPTIONS)
    vlm, calls = build_vlm(), []

    def count(module, args, kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise Stop

    handle = vlm.model.model.register_forward_pre_hook(count, with_kwargs=True)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        evaluate(vlm, "all", data, out, batch_size=2, **OPTIONS)
    assert not (out / "results.json").exists()
    n_kept = len((out / JOURNAL).read_text().splitlines()) - 1
    assert n_kept >= 2
    with (out / JOURNAL).open("a") as stream:
        stream.write('{"half a li')  # the crash hit while a line was written
    n_before = len(calls)
    again = evaluate(vlm, "all", data, out, batch_size=2, **OPTIONS)
    handle.remove()
    n_whole = []
    fresh = build_vlm()
    fresh.model.model.register_forward_pre_hook(lambda *args: n_whole.append(1))
    evaluate(fresh, "all", data, tmp_path / "fresh", batch_size=2, **OPTIONS)
    assert len(calls) - n_before < len(n_whole), "nothing was remembered"
    for name, bench in reference["benches"].items():
        assert {**again["benches"][name], "seconds_per_item": 0} == {**bench, "seconds_per_item": 0}
    assert (out / "predictions.jsonl").read_text() == (
        tmp_path / "whole/predictions.jsonl"
    ).read_text()
    assert not (out / JOURNAL).exists()


@pytest.mark.parametrize("text", ["中文", "a\u2028b\x85c", "line\nbreak"])
def test_any_text_is_kept_and_a_line_cut_within_a_character_is_dropped(tmp_path, text):
    journal = AnswerJournal(tmp_path / "j", {"weights": "a"})
    journal.record({"whole": Answer(text, 2, True)})
    journal.record({"cut": Answer("中" * 9, 2, True)})
    content = (tmp_path / "j").read_bytes()
    for n_lost in (60, 61, 62):  # one of them within a character of three bytes
        (tmp_path / "j").write_bytes(content[:-n_lost])
        again = AnswerJournal(tmp_path / "j", {"weights": "a"})
        assert again.get("whole") == Answer(text, 2, True)
        assert again.get("cut") is None


def test_a_journal_of_other_weights_is_not_used(tmp_path):
    first = AnswerJournal(tmp_path / "j", {"weights": "a"})
    first.record({"q": Answer("yes", 2, True, seconds=1.5), "bad": Answer(None, error="broken")})
    same = AnswerJournal(tmp_path / "j", {"weights": "a"})
    assert same.get("q") == Answer("yes", 2, True)
    assert same.served_seconds == 1.5
    assert same.get("bad") is None, "a failed sample is asked again"
    assert AnswerJournal(tmp_path / "j", {"weights": "b"}).get("q") is None
    vlm = build_vlm()
    before = fingerprint_weights(vlm.model)
    assert before == fingerprint_weights(build_vlm().model)
    with torch.no_grad():
        next(iter(vlm.model.parameters())).mul_(1.01)
    assert fingerprint_weights(vlm.model) != before


def test_text_tasks_ask_the_live_model(tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'milora-vl[text]'")
    rows = [{"q": f"{n} is", "choices": ["even", "odd"], "answer": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "parity.yaml").write_text(
        "task: parity_of_numbers\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\nmetadata: {version: 3}\n"
    )
    vlm = build_vlm()
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = vlm.with_model(get_peft_model(vlm.model, config))
    adapters = [m for name, m in adapted.model.named_modules() if name.endswith("lora_A.default")]
    used = []
    adapters[-1].register_forward_hook(lambda *args: used.append(1))
    out = tmp_path / "out"
    found = evaluate(adapted, "lm:parity_of_numbers", tmp_path, out, text_probe=False)["benches"]
    assert used, "the adapter was left out"
    entry = found["lm:parity_of_numbers"]
    assert json.loads((out / "results.json").read_text())["benches"] == found
    assert (entry["metric"], entry["n"], entry["version"]) == ("acc", 6, 3)
    assert 0 <= entry["score"] <= 1
    with pytest.raises(ValueError, match="no_such_task"):
        run_text_tasks(vlm, ["no_such_task"], include_path=tmp_path)


def test_mcnemar_is_exact():
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(8, 1) == mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 512)
    assert mcnemar(9000, 8000) < 1e-12


def test_runs_are_compared_with_paired_tests_and_pictures(tmp_path):
    data = write_benches(tmp_path / "data")
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / "runs" / name
        evaluate(build_vlm(seed=seed), "all", data, folder / "eval_after", **OPTIONS)
        log = {"stage": "finetune", "step": 1, "loss_nats_per_token": 2.0}
        log["train_samples_per_second"] = 12.5
        (folder / "metrics.jsonl").write_text(json.dumps(log) + "\n")
    base = json.loads((tmp_path / "runs/a/eval_after/results.json").read_text())
    (folder / "eval_before").mkdir()
    (folder / "eval_before/results.json").write_text(json.dumps(base))
    lines = (folder / "eval_after/predictions.jsonl").read_text().splitlines()
    right = [json.loads(line) for line in lines]
    right = [{**row, "parsed": row["answers"][0], "score": 1.0} for row in right]
    text = "".join(json.dumps(row) + "\n" for row in right)
    (folder / "eval_after/predictions.jsonl").write_text(text)
    out = tmp_path / "page.html"
    runs = [tmp_path / "runs/a", tmp_path / "runs/b", tmp_path / "runs/a/eval_after"]
    console = Console(record=True, width=220)
    changes = compare_runs(runs, out, console)
    assert changes["pope"]["b"]["n_worse"] == 0
    assert changes["pope"]["b"]["p_mcnemar"] == pytest.approx(
        mcnemar(changes["pope"]["b"]["n_better"], 0)
    )
    assert changes["pope"]["eval_after"]["difference"] == 0
    assert changes["pope"]["eval_after"]["p_bootstrap"] == 1
    assert "p_mcnemar" in changes["mmbench"]["b"]
    page = out.read_text()
    for part in ("McNemar", "text_perplexity_ratio", "12.5", "Where the runs disagree", "jpeg"):
        assert part in page
    shown = console.export_text()
    assert "bootstrap" in shown
    assert "b: text_loss_before_nats_per_token" in shown
    assert "a: text_loss_after_nats_per_token" in shown, "without a base its loss alone"
    with pytest.raises(ValueError, match="two runs"):
        compare_runs(runs[:1], out)
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        compare_runs([tmp_path, runs[0]], out)
