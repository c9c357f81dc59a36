"""Every known trap of MMBench files and scores, one test each."""

import base64

import pytest
from eval_models import judged, picture_bytes

from milora_vl.eval.benches import mmbench
from milora_vl.eval.scoring import write_submission

IMAGE = base64.b64encode(picture_bytes(0)).decode()
STEP = 1_000_000


def write_tsv(path, rows, columns="index question hint A B C D answer category image l2-category"):
    names = columns.split()
    lines = ["\t".join(names)]
    lines += ["\t".join(str(row.get(name, "")) for name in names) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rotations(base, options, right, **more):
    """The rows of one question: options and answer move, the rest stays."""
    rows = []
    for turn in range(len(options)):
        turned = options[turn:] + options[:turn]
        rows.append(
            {
                "index": base + turn * STEP,
                "question": f"Question {base}?",
                **dict(zip("ABCD", turned, strict=False)),
                "answer": "ABCD"[turned.index(right)],
                "category": "naming",
                "image": IMAGE if turn == 0 else base,
                "l2-category": "CP",
                **more,
            }
        )
    return rows


def sure(bench, items):
    return [item.answers[0] for item in items]


@pytest.fixture
def two_questions(tmp_path):
    rows = rotations(3, ["cat", "dog", "fox", "owl"], "dog")
    rows += rotations(5, ["red", "blue"], "red", category="colour")
    write_tsv(tmp_path / "mmbench.tsv", rows)
    return mmbench.load(tmp_path)


def test_mmbench_prompt_is_llavas(tmp_path):
    rows = rotations(1, ["cat", "dog"], "dog", hint="Look closely.")
    write_tsv(tmp_path / "mmbench_dev_20230712.tsv", rows)
    first = mmbench.load(tmp_path)[0]
    assert first.prompt == (
        "Look closely.\nQuestion 1?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_mmbench_chinese_file_gets_the_chinese_suffix(tmp_path):
    path = write_tsv(tmp_path / "MMBench_DEV_CN.tsv", rotations(1, ["cat", "dog"], "dog"))
    item = mmbench.load(path)[0]
    assert item.prompt.endswith("B. dog\n请直接回答选项字母。")


def test_mmbench_short_image_is_the_index_of_the_row_that_has_it(two_questions):
    assert {item.image.encoded for item in two_questions} == {IMAGE}
    assert len({item.image.key() for item in two_questions}) == 1


def test_mmbench_image_references_that_lead_nowhere_are_reported_when_read(tmp_path):
    rows = rotations(1, ["cat", "dog"], "dog", image="77")
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))
    with pytest.raises(ValueError, match=r"mmbench\.tsv row 2 \(index 1000001\).*no image"):
        items[1].image.read()


def test_mmbench_corrupt_base64_names_file_and_row(tmp_path):
    rows = rotations(1, ["cat", "dog"], "dog", image="!" * 80)
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))
    with pytest.raises(ValueError, match=r"mmbench\.tsv row 1 .*base64"):
        items[0].image.read()


@pytest.mark.parametrize("gone", ["None", "NA", "null", "nan", ""])
def test_mmbench_options_stop_at_the_first_missing_one_as_officially_parsed(tmp_path, gone):
    rows = rotations(1, ["cat", "dog", "fox", "owl"], "dog")
    rows[0]["C"] = gone
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))
    assert items[0].options == ("cat", "dog")
    assert "owl" not in items[0].prompt


def test_mmbench_numbers_as_options_stay_as_written(tmp_path):
    rows = rotations(1, ["1", "2.50", "3"], "3")
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))
    assert items[0].options == ("1", "2.50", "3")


def test_mmbench_missing_hint_as_the_word_nan_is_no_hint(tmp_path):
    items = mmbench.load(
        write_tsv(tmp_path / "mmbench.tsv", rotations(1, ["a", "b"], "a", hint="nan"))
    )
    assert items[0].prompt.startswith("Question 1?")


def test_mmbench_is_right_only_in_all_rotations(two_questions):
    texts = sure(mmbench, two_questions)
    assert mmbench.summarize(judged(mmbench, two_questions, texts))["score"] == 1
    for place in range(len(texts)):
        one_wrong = list(texts)
        one_wrong[place] = "B" if texts[place] == "A" else "A"
        result = mmbench.summarize(judged(mmbench, two_questions, one_wrong))
        assert result["score"] == 0.5
        assert result["vanilla_all"]["score"] == pytest.approx(5 / 6)


def test_mmbench_golden_circular_vectors(tmp_path):
    rows = rotations(1, ["cat", "dog", "fox", "owl"], "cat")
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))
    assert [item.answers[0] for item in items] == ["A", "D", "C", "B"]
    for texts, score in (
        (["A", "D", "C", "B"], 1),
        (["A", "A", "A", "A"], 0),
        (["cat"] * 4, 1),
        (["A", "D", "C", ""], 0),
    ):
        assert mmbench.summarize(judged(mmbench, items, texts))["score"] == score


def test_mmbench_always_a_scores_in_one_pass_and_not_circularly(tmp_path):
    rows = [row for base in range(8) for row in rotations(base, ["x", "y", "z"], "x")]
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))
    result = mmbench.summarize(judged(mmbench, items, ["A"] * len(items)))
    assert result["vanilla_circ0"]["score"] == 1
    assert result["score"] == 0
    assert result["letter_share"] == {"A": 1}


def test_mmbench_breakdown_counts_questions_not_rows(two_questions):
    texts = sure(mmbench, two_questions)
    texts[0] = "nothing of this"
    result = mmbench.summarize(judged(mmbench, two_questions, texts))
    assert result["n"] == 2
    assert result["n_rows"] == 6
    assert result["by_category"] == {"colour": 1, "naming": 0}
    assert result["by_l2"] == {"CP": 0.5}
    assert result["metric"] == "circular_accuracy"
    assert result["unparsed_rate"] == pytest.approx(1 / 6)
    assert result["off_letter_rate"] == pytest.approx(1 / 6)


def test_mmbench_groups_by_g_index_where_there_is_one(tmp_path):
    rows = rotations(1, ["a", "b"], "a", g_index=9) + rotations(2, ["a", "b"], "b", g_index=9)
    columns = "index question A B answer category image g_index"
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows, columns))
    assert {item.group for item in items} == {"9"}


def test_mmbench_limit_keeps_whole_questions(tmp_path):
    rows = [row for base in range(20) for row in rotations(base, ["x", "y", "z"], "x")]
    write_tsv(tmp_path / "mmbench.tsv", rows)
    items = mmbench.sample(mmbench.load(tmp_path), 5)
    assert len(items) == 15
    assert len({item.group for item in items}) == 5
    assert items == mmbench.sample(mmbench.load(tmp_path), 5)


def test_mmbench_file_without_rotations_does_not_claim_circular(tmp_path, caplog):
    rows = rotations(1, ["a", "b"], "a")[:1]
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))
    assert mmbench.summarize(judged(mmbench, items, ["A"]))["metric"] == "accuracy"
    assert "lack a rotated row" in caplog.text


def test_mmbench_majority_is_chance_when_answers_are_spread(tmp_path):
    options = ["1", "2", "3", "4"]
    even = [row for base in range(8) for row in rotations(base, options, options[base % 4])]
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", even))
    assert mmbench.majority(items) == 0.25
    tilted = [row for base in range(8) for row in rotations(base, options, "1" if base else "2")]
    items = mmbench.load(write_tsv(tmp_path / "mmbench.tsv", tilted))
    assert mmbench.majority(items) == 7 / 8


def test_mmbench_test_split_has_no_answers_but_a_submission(tmp_path):
    rows = rotations(1, ["cat", "dog"], "dog")
    for row in rows:
        del row["answer"]
    columns = "index question A B category image l2-category"
    items = mmbench.load(write_tsv(tmp_path / "mmbench_test.tsv", rows, columns))
    assert [item.answers for item in items] == [(), ()]
    paths = write_submission(mmbench.submission(items, {item.id: "B" for item in items}), tmp_path)
    lines = paths[0].read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t")[-1] == "prediction"
    assert lines[2].split("\t")[0] == "1000001"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"index": "x"}, "row 1.*not a number"), ({"index": 1 + STEP}, "occurs twice")],
)
def test_mmbench_malformed_index_is_an_error(tmp_path, change, message):
    rows = rotations(1, ["a", "b"], "a")
    rows[0] |= change
    with pytest.raises(ValueError, match=message):
        mmbench.load(write_tsv(tmp_path / "mmbench.tsv", rows))


def test_mmbench_missing_column_and_ambiguous_folder(tmp_path):
    path = write_tsv(tmp_path / "a_mmbench.tsv", [{"index": 1}], "index question")
    with pytest.raises(ValueError, match="no column A, B, image"):
        mmbench.load(path)
    write_tsv(tmp_path / "b_mmbench.tsv", rotations(1, ["a", "b"], "a"))
    with pytest.raises(ValueError, match="several files"):
        mmbench.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="mmbench"):
        mmbench.load(tmp_path / "nothing")
