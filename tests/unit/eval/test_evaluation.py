import json
from dataclasses import replace

import pytest
from eval_data import write_benches
from eval_models import build_vlm

from milora_vl.eval import evaluate
from milora_vl.eval.__main__ import main
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.comparison import compare_folders, read_rows
from milora_vl.eval.evaluation import bench_names, check_parity
from milora_vl.eval.generate_shared import build_answerer
from milora_vl.eval.items import EvaluationError, Request

CONTRACT = {
    *("metric", "score", "interval_95", "blind", "majority", "n", "by_category"),
    *("seconds_per_item", "version"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benches(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """One evaluation of a tiny model on everything."""
    out = tmp_path_factory.mktemp("out")
    options = {"progress": False, "parity_check": 3, "max_new_tokens": 3}
    results = evaluate(build_vlm(), "all", data, out, model_name="tiny", **options)
    return out, results


def test_results_file_is_what_is_returned_and_has_the_promised_form(done):
    out, results = done
    assert json.loads((out / "results.json").read_text()) == results
    assert results["model"] == "tiny"
    assert results["adapter"] is None
    assert list(results["benches"]) == ["mmbench", "pope", "vqav2"]
    for bench in results["benches"].values():
        assert set(bench) >= CONTRACT
        low, high = bench["interval_95"]
        assert 0 <= low <= high <= 1
        assert 0 <= bench["blind"] <= 1
        assert all(isinstance(value, float) for value in bench["by_category"].values())
        assert bench["seconds_per_item"] > 0
        assert bench["n_errors"] == 0
        assert bench["parity"]["n_different"] == 0
        assert bench["parity"]["n"] == 3
    assert results["text_probe"]["loss_nats_per_token"] > 0
    assert results["benches"]["mmbench"]["n"] == 2
    assert results["benches"]["mmbench"]["n_rows"] == 8


def test_predictions_hold_every_question_and_give_the_score_again(done, data):
    out, results = done
    rows = read_rows(out)
    for name in results["benches"]:
        bench = BENCHES[name]
        items = bench.load(data)
        assert [row.id for row in rows[name]] == [item.id for item in items]
        assert bench.summarize(rows[name])["score"] == results["benches"][name]["score"]
        again = [bench.judge(item, row.text) for item, row in zip(items, rows[name], strict=True)]
        assert again == rows[name]
    line = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert {"bench", "blind_text", "blind_score", "ended", "error", "image"} <= set(line)


def test_no_blind_run_leaves_its_numbers_empty(data, tmp_path):
    options = {"progress": False, "blind": False, "max_new_tokens": 1}
    bench = evaluate(build_vlm(), ["vqav2"], data, tmp_path, **options)["benches"]["vqav2"]
    assert bench["blind"] is None
    assert bench["majority"] == 1
    assert "cut at the token limit" in bench["note"]


def test_limit_is_for_all_benches_or_by_name(data, tmp_path):
    options = {"progress": False, "blind": False, "max_new_tokens": 1}
    vlm = build_vlm()
    benches = evaluate(vlm, "mmbench,pope", data, tmp_path, limit=1, **options)["benches"]
    assert (benches["mmbench"]["n_rows"], benches["pope"]["n"]) == (4, 1)
    benches = evaluate(vlm, "mmbench,pope", data, tmp_path, limit={"pope": 6}, **options)["benches"]
    assert (benches["mmbench"]["n_rows"], benches["pope"]["n"]) == (8, 6)


def test_a_missing_picture_fails_the_run_unless_allowed(tmp_path):
    data = write_benches(tmp_path / "data")
    (data / "images/bench/p2.png").unlink()
    options = {"progress": False, "max_new_tokens": 1}
    with pytest.raises(EvaluationError, match=r"questions\.json questions\[2\].*p2\.png"):
        evaluate(build_vlm(), "vqav2", data, tmp_path / "out", **options)
    assert not (tmp_path / "out/results.json").exists()
    results = evaluate(build_vlm(), "vqav2", data, tmp_path / "out", allow_errors=1, **options)
    bench = results["benches"]["vqav2"]
    assert bench["n_errors"] == 1
    assert "1 failed samples count as wrong" in bench["note"]
    row = read_rows(tmp_path / "out")["vqav2"][2]
    assert (row.text, row.score) == (None, 0)


def test_published_questions_without_answers_give_a_submission(tmp_path):
    data = write_benches(tmp_path / "data")
    (data / "vqa/annotations.json").unlink()
    options = {"progress": False, "max_new_tokens": 1}
    bench = evaluate(build_vlm(), "vqav2", data, tmp_path / "o", **options)["benches"]["vqav2"]
    assert bench["score"] is None
    assert len(json.loads((tmp_path / "o/vqav2_submission.json").read_text())) == bench["n"]


def test_a_data_set_of_its_own_is_named_in_the_results(tmp_path):
    data = write_benches(tmp_path / "data")
    (data / "manifest.json").write_text('{"name": "StickerVQA"}')
    options = {"progress": False, "blind": False, "max_new_tokens": 1}
    assert evaluate(build_vlm(), "pope", data, tmp_path, **options)["data_set"] == "StickerVQA"


def test_a_file_or_folder_of_that_data_set_is_still_not_called_by_the_benchs_name(tmp_path):
    data = write_benches(tmp_path / "data")
    (data / "manifest.json").write_text('{"name": "StickerVQA"}')
    options = {"progress": False, "blind": False, "max_new_tokens": 1, "text_probe": False}
    for bench, place in (("mmbench", "mmbench.tsv"), ("vqav2", "vqa/questions.json")):
        results = evaluate(build_vlm(), bench, data / place, tmp_path, **options)
        assert results["data_set"] == "StickerVQA"
        assert results["text_probe"] is None
    with pytest.raises(ValueError, match=r"one file: name its bench"):
        evaluate(build_vlm(), "all", data / "mmbench.tsv", tmp_path, **options)


def test_parity_tells_other_words_from_other_answers(data):
    bench = BENCHES["mmbench"]
    items = bench.load(data)
    answerer = build_answerer(build_vlm())
    requests = [Request(one.id, one.prompt, one.image) for one in items]
    answers = answerer.answer(requests, max_new_tokens=2, progress=False)
    said = {"A": "A", "B": "The answer is B."}
    monkey = {one.id: replace(answers[one.id], text=said["A"]) for one in items}
    answerer.answer_one_by_one = lambda asked, max_new_tokens: {
        one.id: replace(answers[one.id], text="A." if one.id == items[0].id else said["B"])
        for one in asked
    }
    found = check_parity(bench, answerer, items, monkey, len(items), 2)
    assert (found["n"], found["n_different"], found["n_flips"]) == (8, 8, 7)


def test_bench_names():
    assert bench_names("all") == list(BENCHES)
    assert bench_names(" POPE, mmbench,pope") == ["pope", "mmbench"]
    assert bench_names("lm:arc_easy,gsm8k,gqa") == ["lm:arc_easy", "lm:gsm8k", "gqa"]
    assert bench_names("stickervqa") == ["mmbench", "pope", "vqav2"]
    for wrong in ("mm", "", "pope,gqba"):
        with pytest.raises(ValueError, match=r"mmbench, .*pope, .*vqav2"):
            bench_names(wrong)


def test_comparison_is_paired_and_counts_what_changed(done):
    out, results = done
    changes = compare_folders(out, out)
    assert list(changes) == list(results["benches"])
    for change in changes.values():
        assert change["difference"] == 0
        assert change["interval_95"] == [0, 0]
        assert change["n_better"] == change["n_worse"] == 0


def edit_predictions(source, target, edit):
    lines = [json.loads(line) for line in (source / "predictions.jsonl").read_text().splitlines()]
    target.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in edit(lines))
    (target / "predictions.jsonl").write_text(text)
    (target / "results.json").write_text((source / "results.json").read_text())
    return target


def all_right(lines):
    return [{**line, "parsed": line["answers"][0], "score": 1.0} for line in lines]


def test_comparison_of_wrong_and_right_answers(done, tmp_path):
    out, results = done
    better = edit_predictions(out, tmp_path / "better", all_right)
    for name, change in compare_folders(out, better).items():
        assert change["difference"] == pytest.approx(1 - results["benches"][name]["score"])
        low, high = change["interval_95"]
        assert low <= change["difference"] <= high
        assert change["n_worse"] == 0


def test_different_questions_or_versions_are_not_compared(done, tmp_path):
    out, _ = done
    fewer = edit_predictions(out, tmp_path / "fewer", lambda lines: lines[4:])
    with pytest.raises(ValueError, match="different questions"):
        compare_folders(out, fewer)
    other = edit_predictions(out, tmp_path / "other", lambda lines: lines)
    results = json.loads((other / "results.json").read_text())
    results["benches"]["mmbench"]["version"] = 99
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="version 1 and 99"):
        compare_folders(out, other)


def test_command_line_from_a_checkpoint_folder(data, tmp_path, capsys):
    vlm = build_vlm()
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    words = f"--bench pope --model {tmp_path / 'model'} --data {data} --out {tmp_path / 'out'}"
    words += " --device cpu --prompt-style chatml --limit 4 --no-blind --max-new-tokens 2"
    assert main(words.split()) == 0
    assert "mean f1" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["benches"]["pope"]["n"] == 4
    assert results["prompt_style"] == "chatml"


def test_command_line_errors_are_one_line(data, tmp_path, capsys):
    words = ["--bench", "pope", "--model", str(tmp_path / "none"), "--data", str(data)]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert main([*words[:-1], str(tmp_path / "nothing")]) == 1
    assert "--data" in capsys.readouterr().err


def test_slips_are_found_before_a_model_is_loaded(data, tmp_path, capsys, monkeypatch):
    def never(arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("milora_vl.eval.__main__.load_model", never)
    (tmp_path / "empty").mkdir()
    for bench, folder, message in (
        ("mmbenc", data, "unknown bench"),
        ("gqa", data, "testdev_balanced_questions.json"),
        ("all", tmp_path / "empty", "no files of any bench"),
        ("all", data / "mmbench.tsv", "name its bench"),
        ("pope", tmp_path / "absent", "no such folder"),
        ("custom", None, "--data"),
    ):
        words = ["--bench", bench, "--model", "x", *(["--data", str(folder)] if folder else [])]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for option, value in (("--limit", "0"), ("--limit", "ten"), ("--allow-errors", "-1")):
        with pytest.raises(SystemExit):
            main(["--bench", "pope", option, value])
        assert "is not a whole number" in capsys.readouterr().err


def test_help_names_benches_files_and_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for word in ("mmbench", "coco_pope_random.json", "questions.json", "--adapter", "examples"):
        assert word in text
