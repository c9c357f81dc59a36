"""Judge models behind an endpoint: no score without a name, none from a failed judge."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from eval_models import build_vlm
from official_layouts import llava_w, mmvet
from rich.console import Console

from milora_vl.eval import evaluate
from milora_vl.eval.__main__ import main
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.comparison import compare_folders, compare_pair, read_runs
from milora_vl.eval.judge import Judge, JudgeError
from milora_vl.eval.report import print_results

OPTIONS = {"progress": False, "max_new_tokens": 2}


def printed(folder):
    console = Console(record=True, width=300)
    print_results(json.loads((folder / "results.json").read_text()), console)
    return console.export_text()


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
    assert all("no score without a judge" in plain[name]["note"] for name in plain)
    assert set(json.loads((out / "mmvet_predictions.json").read_text())) == {"v1_0"}
    assert len((out / "llava_w_judge_prompts.jsonl").read_text().splitlines()) == 2
    endpoint.replies = [503, "0.4", "8 6\nBecause", "8 2"]
    options = {**OPTIONS, "judge": endpoint.judge}
    scored = evaluate(build_vlm(), "mmvet,llava-w", tmp_path, out, **options)["benches"]
    assert scored["mmvet"]["score"] == pytest.approx(0.4)
    assert scored["llava-w"]["score"] == pytest.approx(0.5)
    for name, bench in scored.items():
        assert bench["judge"] == "tester-1"
        assert bench["judge_prompt"] == BENCHES[name].JUDGE_PROMPT
        assert "tester-1" in bench["note"]
        assert bench["judge_prompt"] in bench["note"]
    shown = printed(out)
    assert shown.count("judged by tester-1 with milora_vl mmvet 1") == 1
    assert shown.count("judged by tester-1 with milora_vl llava-w 1") == 1
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


def test_a_reply_cut_short_by_a_crash_is_asked_again(tmp_path, endpoint):
    kept = tmp_path / "replies.jsonl"
    prompts = {"a": "Grade a", "b": "Grade b"}
    first = endpoint.judge.ask_all(prompts, bool, kept, progress=False)
    kept.write_bytes(kept.read_bytes()[:-9])
    assert endpoint.judge.ask_all(prompts, bool, kept, progress=False) == first
    assert [body["messages"][0]["content"] for _, body in endpoint.seen] == [
        *("Grade a", "Grade b", "Grade b"),
    ]
    assert len(kept.read_text().splitlines()) == 2


def test_a_kept_reply_without_a_grade_is_asked_again_and_replaced(tmp_path, endpoint):
    kept = tmp_path / "replies.jsonl"
    for _ in range(2):
        endpoint.judge.ask_all({"a": "Grade a"}, bool, kept, progress=False)
    assert len(endpoint.seen) == 1
    endpoint.replies = ["0.7"]
    for _ in range(2):
        replies = endpoint.judge.ask_all({"a": "Grade a"}, "0.7".__eq__, kept, progress=False)
        assert replies == {"a": "0.7"}
    assert len(endpoint.seen) == 2


def test_scores_of_two_judges_are_not_compared(tmp_path, endpoint):
    mmvet(tmp_path)
    other = Judge(endpoint.judge.url, "tester-2", wait_s=0.0)
    folders = []
    for judge in (endpoint.judge, other):
        folders.append(tmp_path / judge.model)
        evaluate(build_vlm(), "mmvet", tmp_path, folders[-1], judge=judge, **OPTIONS)
    assert "different judges" in compare_pair(*read_runs(folders), "mmvet")["why_not"]
    with pytest.raises(ValueError, match=r"tester-1.*tester-2"):
        compare_folders(*folders)


def test_half_a_judge_is_an_error_before_anything_is_loaded(tmp_path, capsys):
    mmvet(tmp_path)
    words = ["--bench", "mmvet", "--model", "none", "--data", str(tmp_path)]
    assert main([*words, "--judge-url", "http://127.0.0.1/v1"]) == 1
    assert "--judge-model is needed" in capsys.readouterr().err
    assert main([*words, "--judge-model", "x"]) == 1
    assert "--judge-url" in capsys.readouterr().err
