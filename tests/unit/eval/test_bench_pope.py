"""Every known trap of POPE files and scores, one test each."""

import json

import pytest
from eval_models import judged, picture_bytes

from milora_vl.eval.bench_files import BenchError
from milora_vl.eval.benches import pope


def pope_row(number, label, image="a.png", text="Is there a dog in the image?"):
    return {"question_id": number, "image": image, "text": text, "label": label}


def write_pope(folder, **categories):
    (folder / "pope").mkdir(exist_ok=True)
    for category, rows in categories.items():
        lines = [json.dumps(row) for row in rows]
        (folder / "pope" / f"{category}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_pope_joins_by_category_and_id_never_by_order(tmp_path):
    labels = [("yes", 1), ("no", 2), ("no", 5)]  # a gap, as in the release of 2,910 rows
    rows = [pope_row(number, label) for label, number in labels]
    write_pope(tmp_path, random=rows, popular=rows[::-1], adversarial=rows[:1])
    items = pope.load(tmp_path)
    assert [item.id for item in items][:4] == ["random/1", "random/2", "random/5", "popular/5"]
    by_id = {item.id: item.answers[0] for item in items}
    assert by_id["random/5"] == "no"
    assert by_id["popular/1"] == "yes"


def test_pope_official_file_names_and_misspelt_questions_are_kept(tmp_path):
    text = "Is there an umbrella in the imange?"
    folder = tmp_path / "coco"
    folder.mkdir()
    (folder / "coco_pope_random.json").write_text(json.dumps(pope_row(1, "no", text=text)))
    item = pope.load(tmp_path)[0]
    assert item.prompt == f"{text}\nAnswer the question using a single word or phrase."


def test_pope_headline_is_the_mean_of_the_categories_f1(tmp_path):
    write_pope(
        tmp_path,
        random=[pope_row(number, "yes" if number < 3 else "no") for number in range(4)],
        popular=[pope_row(number, "yes" if number < 1 else "no") for number in range(4)],
    )
    items = pope.load(tmp_path)
    texts = ["Yes", "Yes", "No", "Yes", "Yes", "Yes", "No", "No"]
    result = pope.summarize(judged(pope, items, texts))
    assert result["by_category"]["random"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert result["by_category"]["popular"] == pytest.approx(2 / 3)
    assert result["score"] == pytest.approx((4 / 6 + 2 / 3) / 2)
    assert result["metric"] == "mean_f1"
    assert result["missing_categories"] == ["adversarial"]
    low, high = result["interval_95"]
    assert low <= result["score"] <= high


def test_pope_yes_ratio_counts_predictions_not_labels(tmp_path):
    write_pope(tmp_path, random=[pope_row(0, "yes"), pope_row(1, "no")])
    items = pope.load(tmp_path)
    result = pope.summarize(judged(pope, items, ["No", "No"]))
    details = result["by_category_details"]["random"]
    assert details["yes_ratio"] == 0
    assert details["label_yes_ratio"] == 0.5
    assert details["f1"] == details["precision"] == 0  # no division by zero


def test_pope_official_parse_takes_chatter_for_yes_and_strict_does_not(tmp_path):
    write_pope(tmp_path, random=[pope_row(0, "yes"), pope_row(1, "no")])
    items = pope.load(tmp_path)
    result = pope.summarize(judged(pope, items, ["There is a dog.", "Nope"]))
    details = result["by_category_details"]["random"]
    assert details["yes_ratio"] == 1
    assert details["accuracy"] == 0.5
    assert details["strict_accuracy"] == 0
    assert result["off_format_rate"] == 1


def test_pope_failed_sample_is_wrong_and_not_a_yes(tmp_path):
    write_pope(tmp_path, random=[pope_row(0, "yes"), pope_row(1, "no")])
    items = pope.load(tmp_path)
    empty = pope.summarize(judged(pope, items, ["", ""]))
    failed = pope.summarize(judged(pope, items, [None, None]))
    assert (empty["accuracy"], empty["yes_ratio"]) == (0.5, 1)
    assert (failed["accuracy"], failed["yes_ratio"]) == (0, 0)


def test_pope_majority_is_always_yes(tmp_path):
    write_pope(
        tmp_path, random=[pope_row(number, ["yes", "no"][number % 2]) for number in range(6)]
    )
    assert pope.majority(pope.load(tmp_path)) == pytest.approx(2 / 3)


def test_pope_limit_is_balanced(tmp_path):
    rows = [pope_row(number, ["yes", "no"][number % 2]) for number in range(60)]
    write_pope(tmp_path, random=rows, popular=rows, adversarial=rows)
    items = pope.sample(pope.load(tmp_path), 24)
    for category in pope.CATEGORIES:
        labels = [item.answers[0] for item in items if item.category == category]
        assert (labels.count("yes"), labels.count("no")) == (4, 4)


def test_pope_finds_pictures_and_groups_by_them(tmp_path):
    for folder in ("images/val", "images/bench"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images/val/v.png").write_bytes(picture_bytes(1))
    (tmp_path / "images/bench/b.png").write_bytes(picture_bytes(2))
    write_pope(tmp_path, random=[pope_row(0, "no", "v.png"), pope_row(1, "no", "b.png")])
    items = pope.load(tmp_path)
    assert [item.image.path.parent.name for item in items] == ["val", "bench"]
    assert [item.group for item in items] == ["v.png", "b.png"]


def test_pope_malformed_files_name_file_and_line(tmp_path):
    write_pope(tmp_path, random=[pope_row(1, "yes"), pope_row(1, "no")])
    with pytest.raises(ValueError, match=r"random/1.*occurs twice"):
        pope.load(tmp_path)
    write_pope(tmp_path, random=[pope_row(1, "maybe")])
    with pytest.raises(ValueError, match=r"random\.jsonl row 1.*maybe"):
        pope.load(tmp_path)
    (tmp_path / "pope/random.jsonl").write_text('{"question_id": 1}\n\n{"question_id": 2')
    with pytest.raises(ValueError, match=r"random\.jsonl line 3.*JSON"):
        pope.load(tmp_path)
    (tmp_path / "pope/random.jsonl").write_text('{"question_id": 1}\n')
    with pytest.raises(ValueError, match=r"row 1: no key 'text'"):
        pope.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="coco_pope_random"):
        pope.load(tmp_path / "pope" / "nothing")


def test_image_names_cannot_leave_the_folder(tmp_path):
    write_pope(tmp_path, random=[pope_row(1, "yes", image="../../etc/passwd")])
    with pytest.raises(BenchError, match=r"random\.jsonl row 1.*outside"):
        pope.load(tmp_path)
