"""Traps of VQAv2 files and scores, and what all benches have in common."""

import json

import pytest
from eval_models import judged, picture_bytes

from milora_vl.eval.benches import BENCHES, vqav2
from milora_vl.eval.evaluation import judge_all
from milora_vl.eval.items import EvaluationError
from milora_vl.eval.scoring import write_submission


def write_vqa(folder, questions, annotations=None, stem="v2_OpenEnded_mscoco_val2014"):
    content = {"data_subtype": "val2014", "questions": questions}
    (folder / f"{stem}_questions.json").write_text(json.dumps(content))
    if annotations is not None:
        name = f"{stem.replace('OpenEnded_', '')}_annotations.json"
        (folder / name).write_text(json.dumps({"annotations": annotations}))
    return folder


def vqa_question(number, image=7):
    return {"question_id": number, "image_id": image, "question": "What colour?"}


def vqa_annotation(number, answers, answer_type="other"):
    people = [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers, 1)]
    return {
        "question_id": number,
        "answers": people,
        "answer_type": answer_type,
        "question_type": "what",
    }


def test_vqa_official_names_prompt_and_picture(tmp_path):
    write_vqa(tmp_path, [vqa_question(1)], [vqa_annotation(1, ["red"] * 10)])
    (tmp_path / "val2014").mkdir()
    name = "COCO_val2014_000000000007.jpg"
    (tmp_path / "val2014" / name).write_bytes(picture_bytes(1))
    item = vqav2.load(tmp_path)[0]
    assert item.image.path == tmp_path / "val2014" / name
    assert item.prompt == "What colour?\nAnswer the question using a single word or phrase."


def test_vqa_joins_annotations_by_id_and_reports_answer_types(tmp_path):
    write_vqa(
        tmp_path,
        [vqa_question(1), vqa_question(2), vqa_question(3, image=8)],
        [
            vqa_annotation(3, ["yes"] * 10, "yes/no"),
            vqa_annotation(2, ["blue"] * 2 + ["navy"] * 8),
            vqa_annotation(1, ["red"] * 10),
        ],
    )
    items = vqav2.load(tmp_path)
    rows = judged(vqav2, items, ["Red.", "blue", "Yes"])
    assert [row.score for row in rows] == pytest.approx([1, 0.6, 1])
    result = vqav2.summarize(rows)
    assert result["score"] == pytest.approx(2.6 / 3)
    assert result["by_category"] == pytest.approx({"other": 0.8, "yes/no": 1})
    assert result["n"] == 3


def test_vqa_without_annotations_is_for_submission(tmp_path):
    write_vqa(tmp_path, [vqa_question(1), vqa_question(2)], stem="v2_OpenEnded_mscoco_test2015")
    items = vqav2.load(tmp_path)
    assert [item.answers for item in items] == [(), ()]
    path = write_submission(
        vqav2.submission(items, {"1": "It's 1,000", "2": "The dog."}), tmp_path
    )[0]
    assert json.loads(path.read_text()) == [
        {"question_id": 1, "answer": "it 's 1000"},
        {"question_id": 2, "answer": "dog"},
    ]


def test_vqa_files_of_other_sets_are_not_taken(tmp_path):
    write_vqa(tmp_path, [vqa_question(1)], stem="testdev_balanced")
    write_vqa(tmp_path, [vqa_question(1)], stem="v2_MultipleChoice_mscoco_test2015")
    with pytest.raises(FileNotFoundError, match="OpenEnded"):
        vqav2.load(tmp_path)


def test_vqa_majority_is_the_best_constant_of_a_question_type(tmp_path):
    answers = ["red"] * 6 + ["blue"] * 4
    write_vqa(
        tmp_path,
        [vqa_question(number) for number in range(10)],
        [vqa_annotation(number, [answer] * 10) for number, answer in enumerate(answers)],
    )
    assert vqav2.majority(vqav2.load(tmp_path)) == pytest.approx(0.6)


def test_vqa_malformed_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="questions"):
        vqav2.load(tmp_path)
    write_vqa(tmp_path, [vqa_question(1)], [])
    with pytest.raises(ValueError, match=r"question 1 has no annotation"):
        vqav2.load(tmp_path)
    write_vqa(tmp_path, [vqa_question(1)], [vqa_annotation(1, ["red"])])
    with pytest.raises(ValueError, match=r"annotations\[0\]: 1 answers"):
        vqav2.load(tmp_path)
    write_vqa(tmp_path, [vqa_question(1), vqa_question(1)])
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(ValueError, match="occurs twice"):
        vqav2.load(tmp_path)
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text("[1")
    with pytest.raises(ValueError, match="not JSON"):
        vqav2.load(tmp_path)


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_has_the_same_parts(name):
    bench = BENCHES[name]
    assert isinstance(bench.VERSION, int)
    assert bench.MAX_NEW_TOKENS >= 8
    for part in (
        *("load", "parse", "judge", "headline_sums", "headline", "summarize"),
        *("majority", "sample", "submission"),
    ):
        assert callable(getattr(bench, part))


def test_a_missing_prediction_is_an_error(tmp_path):
    write_vqa(tmp_path, [vqa_question(1), vqa_question(2)])
    items = vqav2.load(tmp_path)
    with pytest.raises(EvaluationError, match="2 items without a prediction"):
        judge_all(vqav2, items, {})
