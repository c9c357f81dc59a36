"""Traps of single benches: what counts as right, how points add up, what goes to a server."""

import json

import official_layouts as layouts
import pytest
from eval_models import judged

from milora_vl.eval.answers import is_open_answer_right, m4c_accuracy, parse_choice
from milora_vl.eval.benches import custom, gqa, mme, mmmu, mmvet, seed, sqa, textvqa, vizwiz, vqav2
from milora_vl.eval.scoring import write_submission


def test_gqa_wants_the_very_word_but_for_case_and_final_periods(tmp_path):
    layouts.gqa(tmp_path)
    item = gqa.load(tmp_path)[0]
    scores = {text: gqa.judge(item, text).score for text in ("Red.", "red", "the red", "red, ")}
    assert scores == {"Red.": 1, "red": 1, "the red": 0, "red, ": 0}


def test_gqa_asks_balanced_questions_and_splits_them_by_structure(tmp_path):
    layouts.gqa(tmp_path)
    items = gqa.load(tmp_path)
    assert [item.id for item in items] == ["07", "08", "09"]
    assert [item.category for item in items] == ["open", "open", "binary"]
    result = gqa.summarize(judged(gqa, items, ["red", "red", "no"]))
    assert result["by_category"] == {"binary": 0, "open": 0.5}
    # of the group "color": red 1 -> 2, blue 1 -> 0: (1 + 1) * 2 questions / 2, over 100
    assert result["distribution"] == pytest.approx(0.02)
    assert result["by_n_steps"] == {"02": pytest.approx(1 / 3)}


def test_gqa_does_not_count_the_last_questioning_step(tmp_path):
    layouts.gqa(tmp_path)
    path = next(tmp_path.rglob("*balanced_questions.json"))
    rows = json.loads(path.read_text())
    steps = [("select", "dog (1)"), ("relate", "red,s (2)"), ("query", "name"), ("exist", "?")]
    rows["07"]["semantic"] = [{"operation": one, "argument": other} for one, other in steps]
    path.write_text(json.dumps(rows))
    assert gqa.load(tmp_path)[0].details["n_steps"] == 2


def test_vizwiz_prepends_its_own_line_and_test_goes_to_the_server(tmp_path):
    layouts.vizwiz(tmp_path)
    rows = judged(vizwiz, vizwiz.load(tmp_path), ["Unanswerable", "unanswerable."])
    assert [row.score for row in rows] == [0, 1]
    assert vizwiz.summarize(rows)["unanswerable_rate"] == 1
    test = [{"image": "VizWiz_test_0.jpg", "question": "It's?"}]
    layouts.put(tmp_path / "vizwiz/test.json", test)
    items = vizwiz.load(tmp_path / "vizwiz/test.json")
    assert items[0].answers == ()
    (path,) = write_submission(
        vizwiz.submission(items, {"VizWiz_test_0.jpg": "It's, RED?"}), tmp_path
    )
    assert json.loads(path.read_text()) == [{"image": "VizWiz_test_0.jpg", "answer": "it 's red"}]


def test_a_val_json_of_another_data_set_is_not_taken_for_vizwiz(tmp_path):
    layouts.put(tmp_path / "val.json", [{"image": "a.png", "conversations": []}])
    with pytest.raises(FileNotFoundError, match="VizWiz"):
        vizwiz.load(tmp_path)


def test_textvqa_normalizes_both_sides_with_m4c(tmp_path):
    assert m4c_accuracy("red,blue", ["red,blue"] * 10) == 1  # VQAv2's rule gives 0 here
    layouts.textvqa(tmp_path)
    rows = judged(textvqa, textvqa.load(tmp_path), ["red", "The 1998."])
    assert [row.score for row in rows] == pytest.approx([1, 1])


def test_textvqa_ocr_words_come_from_llavas_file_too_joined_by_question(tmp_path):
    layouts.textvqa(tmp_path)
    next((tmp_path / "textvqa").glob("*Rosetta*")).unlink()
    with pytest.raises(FileNotFoundError, match="textvqa-ocr needs the OCR words"):
        textvqa.load(tmp_path, with_ocr=True)
    rows = [
        {"question_id": "aa", "text": f"{question}\nReference OCR token: {words}\nAnswer"}
        for question, words in (("Year?", "1998"), ("What brand?", "Ford, F"))
    ]
    layouts.put(tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl", layouts.lines(rows))
    words = [item.details["ocr_words"] for item in textvqa.load(tmp_path, with_ocr=True)]
    assert words == ["Ford, F", "1998"]


def test_textvqa_malformed_files_are_errors(tmp_path):
    layouts.textvqa(tmp_path)
    path = tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    next((tmp_path / "textvqa").glob("*Rosetta*")).unlink()
    for text in ("What brand?\nAnswer", "What brand?\nReference OCR tokens\n"):
        layouts.put(path, layouts.lines([{"question_id": "aa", "text": text}]))
        with pytest.raises(ValueError, match=r"ocr\.jsonl row 1: question, OCR words"):
            textvqa.load(tmp_path, with_ocr=True)
    row = {"question_id": "ab", "text": "Year?\nReference OCR token: x\nAnswer"}
    layouts.put(path, layouts.lines([row]))
    with pytest.raises(ValueError, match=r"data\[0\]: no OCR words for image aa"):
        textvqa.load(tmp_path, with_ocr=True)
    row = {"question_id": 7, "image_id": "aa", "question": "What?", "answers": ["red"] * 9}
    layouts.put(tmp_path / "textvqa/TextVQA_0.5.1_val.json", {"data": [row]})
    with pytest.raises(ValueError, match=r"data\[0\]: 9 answers, 10 expected"):
        textvqa.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("B. dog", "B"), ("The answer is B.", "B"), ("D", None), ("(B)", None)),
        *(("b", None), ("B.", None), ("B.dog", None), ("", None), ("AB", None)),
        ("The answer is A. The answer is B.", None),
    ],
)
def test_sqa_parses_as_llava_does(tmp_path, text, letter):
    layouts.sqa(tmp_path)
    assert sqa.parse(sqa.load(tmp_path)[0], text) == letter


def test_sqa_img_and_full_are_two_numbers(tmp_path):
    layouts.sqa(tmp_path)
    items = sqa.load_full(tmp_path)
    result = sqa.summarize_full(judged(sqa, items, ["B", "C"]))
    assert (result["metric"], result["score"]) == ("accuracy", 0.5)
    assert result["img_accuracy"]["score"] == 1
    assert result["by_context"] == {"image": 1, "none": 0}
    image_only = sqa.load(tmp_path)
    assert [item.id for item in image_only] == ["4"]
    assert sqa.summarize(judged(sqa, image_only, ["B"]))["metric"] == "img_accuracy"
    (path,) = write_submission(sqa.submission(items, {"4": "B", "5": "what"}), tmp_path)
    assert json.loads(path.read_text())["results"] == {"4": 1, "5": -1}


def test_mme_points_of_the_golden_pair_set(tmp_path):
    layouts.mme(tmp_path, [("existence", "a"), ("existence", "b")])
    root = tmp_path / "MME/MME_Benchmark_release_version/existence"
    for path in [*root.glob("b.*")]:  # both pictures in the nested form
        sub = "questions_answers_YN" if path.suffix == ".txt" else "images"
        path.rename(root / sub / path.name)
    items = mme.load(tmp_path)
    result = mme.summarize(judged(mme, items, ["Yes", "No", "Yes", "Yes"]))
    assert result["score"] == pytest.approx(75 + 50)
    assert result["maximum"] == 200
    assert mme.majority(items) == 50  # always yes: half the questions, never a pair


def test_mme_half_of_every_pair_gives_500_and_200_points(tmp_path):
    names = (*mme.PERCEPTION, *mme.COGNITION)
    layouts.mme(tmp_path, [(name, "a") for name in names])
    items = mme.load(tmp_path)
    result = mme.summarize(judged(mme, items, ["yes"] * len(items)))
    assert (result["score"], result["cognition"]["score"]) == (500, 200)
    assert result["maximum"] == 2000


def test_mme_sums_perception_and_reports_cognition_beside_it(tmp_path):
    layouts.mme(tmp_path)
    items = mme.load(tmp_path)
    assert items[2].prompt == items[0].prompt  # two spaces before the request make no difference
    result = mme.summarize(judged(mme, items, ["yes", "no", "yes", "no", "yes", "yes"]))
    assert result["score"] == 400
    assert result["cognition"]["score"] == 50
    assert result["by_category"] == {"existence": 200, "OCR": 200, "code_reasoning": 50}


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes.", "yes"), ("No, it", "no"), ("None", "no"), ("a yes", None), ("y", None), ("", None)],
)
def test_mme_reads_the_first_four_characters(text, said):
    assert mme.parse(None, text) == said


def test_mme_pictures_with_one_question_are_an_error(tmp_path):
    layouts.mme(tmp_path)
    text = next((tmp_path / "MME").rglob("000.txt"))
    text.write_text("Is it a cat?\tYes\n")
    with pytest.raises(ValueError, match="existence/000: 1 questions, two"):
        mme.load(tmp_path)


def test_seed_scores_letters_strictly_and_shows_what_leniency_would_give(tmp_path):
    layouts.seed(tmp_path)
    items = seed.load(tmp_path)
    result = seed.summarize(judged(seed, items, ["B", "B. dog"]))
    assert (result["score"], result["lenient_accuracy"]) == (0.5, 1)
    assert (result["image"]["score"], result["video"]["score"]) == (1, 0)
    images = seed.load_images(tmp_path)
    assert [item.id for item in images] == ["1"]
    metrics = [result["metric"], seed.summarize_images(judged(seed, images, ["B"]))["metric"]]
    assert metrics == ["accuracy", "image_accuracy"]
    assert result["by_category"] == {"Action Recognition": 0, "Scene Understanding": 1}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("A", "A"), ("(B)", "B"), ("B.", "B"), ("A or (B)", "B"), ("A then B", "B")),
        *(("I think that it must be a dog", "B"), ("dog", None), ("", None)),
    ],
)
def test_mmmu_letter_in_a_sentence(text, letter):
    assert parse_choice(text, ["cat", "dog"]) == letter


@pytest.mark.parametrize(
    ("text", "answers", "is_right"),
    [
        *(("3", ["3"], True), ("3.001", ["3"], True), ("30", ["3"], False)),
        *(("The answer is 3.", ["3"], True), ("it is a red fox", ["fox"], True)),
        *(("1,000 dollars", ["1000"], True), ("it is x", ["x"], True), ("it is xy", ["x"], False)),
    ],
)
def test_mmmu_open_answers(text, answers, is_right):
    # a single letter must stand at an end, with a space beside it
    assert is_open_answer_right(text, answers) is is_right


def test_mmmu_reads_lists_as_data_and_gives_no_luck_of_the_draw(tmp_path):
    layouts.mmmu(tmp_path)
    items = mmmu.load(tmp_path)
    assert items[0].options == ("cat", "it's a dog")
    assert [item.category for item in items] == ["Art_Theory", "Math"]
    rows = judged(mmmu, items, ["no idea", "three"])
    assert [row.score for row in rows] == [0, 1]
    assert mmmu.summarize(rows)["unparsed_rate"] == 0.5
    (path,) = write_submission(mmmu.submission(items, {one.id: "B" for one in items}), tmp_path)
    assert json.loads(path.read_text()) == {
        "validation_Art_Theory_1": "B",
        "validation_Math_2": "B",
    }


def test_vqav2_test_dev_answers_are_padded_to_the_whole_test_set(tmp_path):
    for split, ids in (("test-dev2015", [2]), ("test2015", [1, 2, 3])):
        rows = [{"question_id": one, "image_id": 9, "question": "What?"} for one in ids]
        path = tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json"
        layouts.put(path, {"data_subtype": split, "questions": rows})
    items = vqav2.load(tmp_path)
    assert [item.id for item in items] == ["2"]
    (path,) = write_submission(vqav2.submission(items, {"2": "A dog"}, tmp_path), tmp_path / "out")
    said = {row["question_id"]: row["answer"] for row in json.loads(path.read_text())}
    assert said == {1: "", 2: "dog", 3: ""}


def test_custom_questions_lettered_free_and_without_a_picture(tmp_path):
    layouts.custom(tmp_path)
    items = custom.load(tmp_path / "custom/custom.jsonl")
    assert [item.answers for item in items] == [("B",), ("Red", "crimson"), ("4",)]
    assert items[2].image is None
    rows = judged(custom, items, ["B", "a crimson.", "four"])
    assert [row.score for row in rows] == [1, 1, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "x.png"}, "row 1: no key 'question'"),
        (
            {"question": "?", "choices": ["a", "b"], "answer": "c"},
            "answer 'c' names no option",
        ),
        ({"question": "?", "choices": ["a"]}, "row 1: 1 choices"),
        ({"question": "?", "choices": ["a", "b"], "answers": ["a"]}, "one of the two"),
    ],
)
def test_custom_errors_name_the_line(tmp_path, row, message):
    layouts.put(tmp_path / "custom.jsonl", layouts.lines([row]))
    with pytest.raises(ValueError, match=message):
        custom.load(tmp_path)


def test_mmvet_grades_are_read_only_when_there_is_exactly_one():
    assert [mmvet.is_usable(text) for text in ("0.4", "Grade: 1.0", "1", "0")] == [True] * 4
    assert not any(mmvet.is_usable(text) for text in ("", "7", "0.5 or 0.6", "1.5", "10"))
