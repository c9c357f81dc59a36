"""One-token answers, answers kept across interruptions, judges, text tasks and many runs."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from eval_data import write_benches
from eval_models import build_vlm, picture
from official_layouts import llava_w, mmvet
from rich.console import Console

from milora_vl.eval import evaluate
from milora_vl.eval.evaluation import JOURNAL
from milora_vl.eval.items import Answer, Request
from milora_vl.eval.job import Job
from milora_vl.eval.journal import AnswerJournal, fingerprint_weights
from milora_vl.eval.judge import Judge, JudgeError
from milora_vl.eval.run_report import compare_runs
from milora_vl.eval.runner import Answerer
from milora_vl.eval.runs import mcnemar
from milora_vl.eval.text_tasks import run_text_tasks

OPTIONS = {"progress": False, "max_new_tokens": 2}


def many_requests(n=120):
    """Questions that expect A or B; three pictures."""
    pictures = [picture(seed) for seed in range(3)]
    return [
        Request(str(place), f"Which? {place}", pictures[place % 3], ("A", "B"))
        for place in range(n)
    ]


def test_choice_tokens_are_those_that_training_teaches():
    for kind, style in (("byte_level", "chatml"), ("llama", "vicuna_v1")):
        vlm = build_vlm(kind, style)
        answerer = Answerer(vlm)
        tokens = answerer._choice_ids(("A", "No such single token at all"))
        assert len(tokens) == 1
        assert vlm.processor.tokenizer.decode(list(tokens)).strip() == "A"


def job_with(n, tokens=frozenset((5,))):
    job = Job(max_new_tokens=4, allow_errors=0)
    for row in range(n):
        job.add(None, [row], tokens, [Request(str(row), "")])
    return job


def test_a_letter_is_trusted_only_after_the_model_was_seen_to_end_after_it():
    job = job_with(40)
    assert job.final_ids() == {}
    job.note_endings({row: [5, 9] for row in range(31)}, {9})
    assert job.final_ids() == {}
    job.note_endings({31: [5, 9]}, {9})
    taken = [bool(job.final_ids()) for _ in range(16)]
    assert taken.count(False) == 2, "every eighth batch is asked to the end"
    job.note_endings({32: [5, 6, 9]}, {9})  # once it went on talking
    assert not any(job.final_ids() for _ in range(16))


def test_other_first_tokens_say_nothing_about_letters():
    job = job_with(3)
    job.note_endings({0: [7, 6, 9], 1: [5], 2: [9]}, {9})
    assert (job.n_confirmed, job.n_refuted) == (0, 0)


def test_answers_from_one_forward_equal_generation():
    requests = many_requests()
    vlm = build_vlm()
    with_shortcut = Answerer(vlm, batch_size=8)
    # every token is an answer and ends one, so that the shortcut is taken wherever it is trusted
    every = frozenset(range(vlm.model.config.text_config.vocab_size))
    with_shortcut._choice_ids = lambda choices: every
    with_shortcut.stop_ids = set(every)
    plain = Answerer(vlm, batch_size=8, one_forward=False)
    plain.stop_ids = set(every)
    ours = with_shortcut.answer(requests, max_new_tokens=3, progress=False)
    theirs = plain.answer(requests, max_new_tokens=3, progress=False)
    assert {one.n_tokens for one in ours.values()} == {1}
    assert {key: one.text for key, one in ours.items()} == {
        key: one.text for key, one in theirs.items()
    }


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


@pytest.fixture
def endpoint():
    """A local endpoint; ``replies`` are given in turn, the last for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append((self.path, body))
            reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
            status = reply if isinstance(reply, int) else 200
            self.send_response(status)
            self.end_headers()
            value = {"choices": [{"message": {"content": reply}}]}
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.replies = [], ["0.5"]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.judge = Judge(f"http://127.0.0.1:{server.server_port}/v1", "tester-1", wait_s=0.0)
    yield server
    server.shutdown()
    server.server_close()


def test_judged_benches_have_no_score_without_a_judge_and_its_name_with_one(tmp_path, endpoint):
    mmvet(tmp_path)
    llava_w(tmp_path)
    out = tmp_path / "out"
    plain = evaluate(build_vlm(), "mmvet,llava-w", tmp_path, out, **OPTIONS)["benches"]
    assert [plain[name]["score"] for name in plain] == [None, None]
    assert set(json.loads((out / "mmvet_predictions.json").read_text())) == {"v1_0"}
    assert len((out / "llava_w_judge_prompts.jsonl").read_text().splitlines()) == 2
    endpoint.replies = [503, "0.4", "8 6\nBecause", "8 2"]
    options = {**OPTIONS, "judge": endpoint.judge}
    scored = evaluate(build_vlm(), "mmvet,llava-w", tmp_path, out, **options)["benches"]
    assert scored["mmvet"]["score"] == pytest.approx(0.4)
    assert scored["llava-w"]["score"] == pytest.approx(0.5)
    for bench in scored.values():
        assert bench["judge"] == "tester-1"
        assert "tester-1" in bench["note"]
    path, body = endpoint.seen[0]
    assert path == "/v1/chat/completions"
    assert body["temperature"] == 0
    n_asked = len(endpoint.seen)
    evaluate(build_vlm(), "mmvet,llava-w", tmp_path, out, **options)
    assert len(endpoint.seen) == n_asked, "replies are kept"


@pytest.mark.parametrize("reply", ["no grade", 401, 500])
def test_a_judge_that_fails_is_an_error_and_no_score(tmp_path, endpoint, reply):
    mmvet(tmp_path)
    endpoint.replies = [reply]
    with pytest.raises(JudgeError, match="tester-1"):
        evaluate(build_vlm(), "mmvet", tmp_path, tmp_path / "o", judge=endpoint.judge, **OPTIONS)
    assert not (tmp_path / "o/results.json").exists()


def test_a_judge_is_a_web_address_with_a_name():
    with pytest.raises(ValueError, match="http"):
        Judge("file:///etc/passwd", "x")
    with pytest.raises(ValueError, match="name"):
        Judge("http://127.0.0.1/v1", "")


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
    found = run_text_tasks(vlm, ["parity_of_numbers"], include_path=tmp_path)
    entry = found["lm:parity_of_numbers"]
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
    (folder / "forgetting.json").write_text('{"text_perplexity_ratio": 1.07}')
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
    assert "bootstrap" in console.export_text()
    with pytest.raises(ValueError, match="two runs"):
        compare_runs(runs[:1], out)
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        compare_runs([tmp_path, runs[0]], out)
