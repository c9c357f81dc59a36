"""Malformed files of every bench end in the bench error, which names file and row."""

import base64
import copy
import json
import logging
import re

import datasets
import official_layouts as layouts
import pandas as pd
import pytest
from eval_data import write_mmbench
from eval_models import build_vlm, judged, picture_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milora_vl.eval import evaluate
from milora_vl.eval.__main__ import main
from milora_vl.eval.bench_files import (
    BenchError,
    Mirror,
    Record,
    check_images,
    gold_letter,
    is_encoded,
    read_json_lines,
)
from milora_vl.eval.benches import BENCHES, custom, gqa, llava_w, mmbench, mmmu, pope, seed, sqa
from milora_vl.eval.comparison import read_rows
from milora_vl.eval.items import ImageSource

ABSENT = "<absent>"
WRONG = (None, ABSENT, "", "red", 7, -1, 1.5, float("nan"), True, [], ["red"], [None], {}, {"a": 1})
JSON_FILES = {
    "gqa": ["gqa/data/testdev_balanced_questions.json"],
    "vizwiz": ["vizwiz/val.json"],
    "sqa-full": ["scienceqa/problems.json", "scienceqa/pid_splits.json"],
    "textvqa-ocr": [
        "textvqa/TextVQA_0.5.1_val.json",
        "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json",
    ],
    "seed": ["seed_bench/SEED-Bench.json"],
    "vqav2": [
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        "vqav2/v2_mscoco_val2014_annotations.json",
    ],
    "mmvet": ["mm-vet/mm-vet.json"],
    "pope": ["pope/coco/coco_pope_random.json"],
    "llava-w": [
        f"llava-bench-in-the-wild/{name}.jsonl" for name in ("questions", "context", "answers_gpt4")
    ],
    "custom": ["custom/custom.jsonl"],
}


def places(value, path=()):
    """Every place of a JSON value, the value itself first."""
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else pairs:
        yield from places(inner, (*path, key))


def with_change(value, path, new):
    if not path:
        return copy.deepcopy(new)
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is ABSENT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return layouts.write_all(tmp_path_factory.mktemp("benches"))


def read(path):
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if is_lines(path) else json.loads(text)


def is_lines(path):
    return path.suffix == ".jsonl" or "pope" in path.name


def write(path, value):
    rows = value if isinstance(value, list) else [value]
    path.write_text(layouts.lines(rows) if is_lines(path) else json.dumps(value))


def check(bench, folder, file):
    """Load; what comes out is the bench error that names the file, or items that can be judged."""
    error = None
    try:
        items = BENCHES[bench].load(folder)
    except BenchError as caught:
        error = str(caught)
    if error is not None:
        assert file.name in error
        assert len(error) < 1000
        return
    rows = judged(BENCHES[bench], items, ["A" for _ in items])
    assert all(isinstance(item.prompt, str) for item in items)
    if any(item.answers for item in items):
        scored = [row for row in rows if row.answers]
        assert 0 <= BENCHES[bench].summarize(scored)["score"] <= 1


@pytest.mark.parametrize("bench", JSON_FILES)
def test_any_wrong_value_anywhere_is_an_error_that_names_the_file_or_does_no_harm(bench, data):
    for name in JSON_FILES[bench]:
        file = data / name
        before = read(file)
        try:
            for path in places(before):
                for wrong in WRONG:
                    if path or wrong is not ABSENT:
                        write(file, with_change(before, path, wrong))
                        check(bench, data, file)
        finally:
            write(file, before)


@pytest.mark.parametrize("bench", JSON_FILES)
@given(content=st.binary(max_size=40))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_bench_error(bench, data, content):
    file = data / JSON_FILES[bench][0]
    before = file.read_bytes()
    try:
        for damaged in (content, before[: len(content) - 40], before[:9] + content + before[9:]):
            file.write_bytes(damaged)
            check(bench, data, file)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("bench", ["mmbench", "mmbench-cn"])
def test_any_cell_of_a_tsv(bench, tmp_path):
    file = tmp_path / f"mmbench_{'cn' if bench.endswith('cn') else 'en'}.tsv"
    write_mmbench(file)
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    wrong = ("", "None", "E", "-5", "1e400", "inf", "['a', 'b']", '"open', "a\tb", "\0", "x.png")
    for row in (0, 1, 2):
        for column in range(len(lines[0])):
            for cell in wrong:
                changed = copy.deepcopy(lines)
                changed[row][column] = cell
                file.write_text("\n".join("\t".join(line) for line in changed))
                check(bench, tmp_path, file)
    for content in (b"", b"\xff\xfe", b"index\n", b"\x1f\x8b\x08"):
        file.write_bytes(content)
        with pytest.raises(BenchError, match=file.name):
            BENCHES[bench].load(tmp_path)


def test_any_cell_of_a_parquet(tmp_path):
    layouts.mmmu(tmp_path)
    file = next(tmp_path.rglob("*.parquet"))
    table = pd.read_parquet(file)
    for column in table.columns:
        for wrong in (None, "", "?", "[", "['x'", "['']", "Z", "multiple-choice", "{1: 2}"):
            changed = table.drop(columns=column)
            is_image = column.startswith("image")
            changed[column] = [None if is_image else wrong, *table[column][1:]]
            changed.to_parquet(file)
            check("mmmu", tmp_path, file)
        table.drop(columns=column).to_parquet(file)
        check("mmmu", tmp_path, file)
    file.write_bytes(b"PAR1 is not enough")
    with pytest.raises(BenchError, match=file.name):
        mmmu.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["no tab", "\tYes\n\tNo", "Is it?\tYes", "Is it?\tmaybe\nIs it?\tNo", "", b"\xff\tYes", "Yes"],
)
def test_any_text_of_mme(text, tmp_path):
    layouts.mme(tmp_path)
    file = next(tmp_path.rglob("000.txt"))
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if not text:  # no line, no question
        assert "existence" not in {item.category for item in BENCHES["mme"].load(tmp_path)}
        return
    with pytest.raises(BenchError, match="000"):
        BENCHES["mme"].load(tmp_path)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("b)", "B"), ("B. dog", "B")),
        *(("dog", "B"), (" dog ", "B"), ("C", None), ("B. cat", None), ("", None), ("dogs", None)),
    ],
)
def test_a_label_in_another_form_is_matched_or_refused(answer, letter):
    row = Record({}, "row 1")
    if letter is None:
        with pytest.raises(BenchError, match=r"row 1.*names no option"):
            gold_letter(answer, ["cat", "dog"], row)
    else:
        assert gold_letter(answer, ["cat", "dog"], row) == letter


def test_a_letter_that_is_also_an_options_text():
    row = Record({}, "row 1")
    assert gold_letter("A", ["B", "A"], row) == "A"  # official files mean the letter
    with pytest.raises(BenchError, match="could mean A or B"):
        gold_letter("a", ["b", "a"], row)


@pytest.mark.parametrize(
    ("bench", "file", "path", "forms"),
    [
        (gqa, "gqa/data/testdev_balanced_questions.json", ("07", "answer"), ["Red", "red."]),
        (seed, "seed_bench/SEED-Bench.json", ("questions", 0, "answer"), ["b", "(B)", "dog"]),
        (pope, "pope/coco/coco_pope_random.json", (1, "label"), ["Yes", "YES."]),
    ],
)
def test_right_answers_are_right_whatever_the_form_of_their_label(bench, file, path, forms, data):
    before = read(data / file)
    (item,) = (one for one in bench.load(data) if one.id in ("07", "1", "random/1"))
    try:
        for form in forms:
            write(data / file, with_change(before, path, form))
            again = {one.id: one for one in bench.load(data)}[item.id]
            assert bench.judge(again, item.answers[0]).score == 1
    finally:
        write(data / file, before)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_path": "x.png"}, "key 'image_path' seems to hold an image"),
        ({"img": "somewhere"}, "key 'img' seems to hold an image"),
        ({"image": "x.png", "second": "y.jpeg"}, "key 'second' seems to hold an image"),
        ({"file": {"bytes": "data:image/png;base64,AAAA"}}, "key 'file' seems to hold"),
        ({"image": {"path": "x.png"}}, "key 'image': a text was expected"),
        ({"image": "https://example.org/x.png"}, "is a URL"),
        ({"options": ["a", "b"]}, "'choices' is what it is called here"),
        ({"choices": {"1": "a", "2": "b"}}, "A, B, ... were expected"),
        ({"choices": ["a", "a"], "answer": "a"}, "two are equal"),
        ({"answers": ["the"]}, "nothing is left"),
        ({"question": "half \ud800"}, "lone surrogate"),
    ],
)
def test_nothing_of_a_custom_row_is_dropped(row, message, tmp_path):
    (tmp_path / "custom.jsonl").write_text(json.dumps({"question": "?", **row}))
    with pytest.raises(BenchError, match=rf"custom\.jsonl row 1: .*{message}"):
        custom.load(tmp_path)


def test_all_images_of_a_custom_row_are_shown_in_order(tmp_path):
    for place, name in enumerate("xyz"):
        (tmp_path / f"{name}.png").write_bytes(picture_bytes(place))
    row = {"question": "?", "image": ["y.png", "x.png"], "images": ["x.png", "z.png"]}
    (tmp_path / "custom.jsonl").write_text(json.dumps(row))
    (item,) = custom.load(tmp_path)
    shown = (item.image, *item.more_images)
    assert [one.path.name for one in shown] == ["y.png", "x.png", "z.png"]


def test_an_image_that_is_not_there_is_told_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(picture_bytes(1))
    good, damaged = {"question": "?", "image": "x.png"}, {"question": "?", "image": "A" * 201 + "="}
    absent = {"question": "?", "image": ["x.png", "y.png"]}
    words = ["--bench", "custom", "--data", str(tmp_path), "--model", "no/model"]
    for rows, message in (
        ([good, absent], r"custom.jsonl row 2: no image"),
        ([good, damaged], r"custom.jsonl row 2: .* base64"),
    ):
        (tmp_path / "custom.jsonl").write_text(layouts.lines(rows))
        assert main([*words, "--out", str(tmp_path / "out")]) == 1
        assert re.search(message, capsys.readouterr().err)
        check_images(custom.load(tmp_path), allowed=1)


def test_other_keys_of_custom_rows_are_named_once(tmp_path, caplog):
    rows = [{"question": "?", "source": "web", "level": place} for place in range(3)]
    (tmp_path / "custom.jsonl").write_text(layouts.lines(rows))
    assert len(custom.load(tmp_path)) == 3
    assert caplog.text.count("keys that are not read: level, source") == 1


def test_pictures_as_text_are_read_in_every_form(tmp_path):
    content = picture_bytes(1, (60, 60))
    plain = base64.b64encode(content).decode()
    wrapped = "\r\n".join(plain[start : start + 76] for start in range(0, len(plain), 76))
    safe = base64.urlsafe_b64encode(content).decode().rstrip("=")
    forms = [plain, wrapped, safe, f"data:image/png;base64,{wrapped}", f"\n{plain}\n"]
    forms += [f"data:;base64,{plain}", f"data:application/octet-stream;base64,{plain}"]
    assert all(map(is_encoded, (*forms, plain[:40], "/9j/4AAQSkZJRgABAQ==")))
    assert not any(map(is_encoded, ("x.png", "9j/4AAQ", "photos/iVBORw0KGgo.png", "data.png")))
    assert all(ImageSource("row", encoded=form).read() == content for form in forms)
    rows = [{"question": "?", "image": form} for form in forms]
    (tmp_path / "custom.jsonl").write_text(layouts.lines(rows))
    assert all(item.image.read() == content for item in custom.load(tmp_path))


def test_pictures_of_sqa_under_another_key_are_not_taken_for_none(data):
    file = data / "scienceqa/problems.json"
    before = read(file)
    try:
        changed = copy.deepcopy(before)
        changed["4"]["images"] = [changed["4"].pop("image")]
        write(file, changed)
        with pytest.raises(BenchError, match=r"problems\.json problem 4: key 'images'"):
            sqa.load_full(data)
    finally:
        write(file, before)


def test_several_pictures_in_a_column_of_a_mirror_are_refused_by_name(tmp_path, monkeypatch):
    def mirror(n):
        images = [{"bytes": picture_bytes(place), "path": None} for place in range(n)]
        row = {"question_id": 1, "question": "?", "caption": "c", "gpt_answer": "g"}
        table = datasets.Dataset.from_list([{**row, "image": images}])
        table = table.cast_column("image", datasets.List(datasets.Image()))
        (tmp_path / str(n)).mkdir()
        table.to_parquet(str(tmp_path / str(n) / "train.parquet"))
        return (Mirror(str(tmp_path / str(n)), None, "train"),)

    monkeypatch.setattr(llava_w, "MIRRORS", mirror(1))
    assert llava_w.load(None)[0].image.read() == picture_bytes(0)
    monkeypatch.setattr(llava_w, "MIRRORS", mirror(2))
    with pytest.raises(BenchError, match="LLaVA-Bench mirror row 0: 2 images"):
        llava_w.load(None)


def tsv(path, rows):
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)


def test_unrelated_ids_a_million_apart_are_two_questions(tmp_path, caplog):
    image = base64.b64encode(picture_bytes(0)).decode()
    row = {"question": "Which?", "A": "cat", "B": "dog", "answer": "A", "image": image}
    turned = {**row, "A": "dog", "B": "cat", "answer": "B", "image": 345_678}
    other = {**row, "question": "What?", "A": "red", "B": "blue"}
    rows = [
        {**row, "index": 345_678},
        {**turned, "index": 1_345_678},
        {**other, "index": 12_345_678},
    ]
    tsv(tmp_path / "mmbench.tsv", rows)
    items = mmbench.load(tmp_path)
    assert [item.group for item in items] == ["345678", "345678", "12345678"]
    assert [item.details["rotation"] for item in items] == [0, 1, 0]
    assert "first is index 12345678" in caplog.text
    result = mmbench.summarize(judged(mmbench, items, ["A", "B", "B"]))
    assert (result["score"], result["n"]) == (0.5, 2)


def test_an_answer_that_no_option_has_is_an_error_unless_the_official_loader_drops_it(
    tmp_path, caplog
):
    image = base64.b64encode(picture_bytes(0)).decode()
    row = {"index": 1, "question": "?", "A": "cat", "B": "dog", "image": image}
    tsv(tmp_path / "mmbench.tsv", [{**row, "C": "", "answer": "C"}])
    with pytest.raises(BenchError, match=r"mmbench\.tsv row 1 \(index 1\).*names no option"):
        mmbench.load(tmp_path)
    tsv(tmp_path / "mmbench.tsv", [{**row, "C": "None", "answer": "C"}])
    assert mmbench.load(tmp_path)[0].options == ("cat", "dog")
    assert "answer C is not among the options" in caplog.text


def test_one_missing_label_takes_no_other_score_away_and_is_told(tmp_path):
    layouts.custom(tmp_path)
    file = tmp_path / "custom/custom.jsonl"
    rows = read_json_lines(file)
    del rows[1]["answers"]
    file.write_text(layouts.lines(rows))
    options = {"progress": False, "max_new_tokens": 1, "text_probe": False}
    bench = evaluate(build_vlm(), "custom", tmp_path, tmp_path / "o", **options)["benches"]
    result = bench["custom"]
    assert result["score"] is not None
    assert (result["n"], result["n_unlabeled"]) == (2, 1)
    assert "1 questions have no label" in result["note"]
    lines = read_json_lines(tmp_path / "o/predictions.jsonl")
    assert [line["score"] is None for line in lines] == [False, True, False]
    assert len(read_rows(tmp_path / "o")["custom"]) == 2


def test_no_message_fills_the_screen(tmp_path, caplog):
    logging.getLogger().setLevel(logging.WARNING)
    long = "x" * 100_000
    (tmp_path / "custom.jsonl").write_text(json.dumps({long: long, "question": [long]}))
    with pytest.raises(BenchError) as caught:
        custom.load(tmp_path)
    assert len(str(caught.value)) < 1000
    (tmp_path / "custom.jsonl").write_text(json.dumps({long: 1, "question": "?"}))
    custom.load(tmp_path)
    assert len(caplog.text) < 2000
