"""Hub mirrors, as small tables on disk in their documented columns: the items of official files."""

import datasets
import pytest
from eval_models import judged, picture_bytes
from official_layouts import PEOPLE, people, write_all

from milora_vl.eval.bench_files import Mirror, MirrorError
from milora_vl.eval.benches import (
    BENCHES,
    gqa,
    llava_w,
    mmbench,
    mme,
    mmmu,
    mmvet,
    pope,
    seed,
    sqa,
    textvqa,
    vizwiz,
    vqav2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("benches"))


def facts(items):
    """What must not depend on where the questions come from."""
    return [
        (one.id, one.prompt, one.answers, one.group, one.category, one.options, one.choices)
        for one in items
    ]


def test_offline_mirrors_say_what_to_do():
    with pytest.raises(MirrorError, match=r"official files here.*--data"):
        gqa.load(None)
    with pytest.raises(FileNotFoundError, match=r"custom.*--data"):
        BENCHES["custom"].load(None)


def save_mirror(folder, rows, *columns):
    """A folder of tables that ``load_dataset`` opens as it opens a hub mirror."""
    table = datasets.Dataset.from_list(rows)
    for column in columns or [name for name in ("image",) if name in rows[0]]:
        is_list = isinstance(rows[0][column], list)
        image = datasets.List(datasets.Image()) if is_list else datasets.Image()
        table = table.cast_column(column, image)
    folder.mkdir(exist_ok=True)
    table.to_parquet(str(folder / "train.parquet"))
    return Mirror(str(folder), None, "train")


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved dict"])
def test_a_local_copy_of_a_mirror_is_read_in_its_place(tmp_path, monkeypatch, kind):
    row = {"id": "0", "question_id": "1", "question": "Is there a fox?", "answer": "yes"}
    row |= {"image_source": "COCO_1", "category": "random", "image": encoded(1)}
    table = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    (tmp_path / "POPE").mkdir()
    if kind == "parquet":
        table.to_parquet(str(tmp_path / "POPE/test-00000.parquet"))
    elif kind == "saved":
        table.save_to_disk(str(tmp_path / "POPE"))
    else:
        datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "POPE"))
    monkeypatch.setenv("MILORA_MIRRORS", str(tmp_path))
    (item,) = pope.load(None)
    assert item.image.read() == picture_bytes(1)
    assert "Is there a fox?" in item.prompt
    if kind == "saved dict":
        (tmp_path / "GQA").mkdir()
        datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "GQA"))
        with pytest.raises(MirrorError, match="GQA: holds no split"):
            gqa.load(None)


def encoded(seed_number):
    return {"bytes": picture_bytes(seed_number), "path": None}


def test_gqa_mirror_joins_pictures_by_id(tmp_path, monkeypatch):
    questions = [
        {"id": "7", "imageId": "n2", "question": "Color?", "answer": "red", "isBalanced": True},
        {"id": "8", "imageId": "n1", "question": "Shape?", "answer": "round", "isBalanced": True},
    ]
    images = [{"id": "n1", "image": encoded(1)}, {"id": "n2", "image": encoded(2)}]
    mirrors = save_mirror(tmp_path / "q", questions), save_mirror(tmp_path / "i", images)
    monkeypatch.setattr(gqa, "MIRRORS", mirrors)
    items = gqa.load(None)
    assert [item.id for item in items] == ["7", "8"]
    assert items[0].image.read() == picture_bytes(2)
    assert items[1].image.read() == picture_bytes(1)


def test_pope_mirror_gives_the_same_items_as_the_files(data, tmp_path, monkeypatch):
    rows = [
        {
            **{"question_id": place, "question": f"Is there a {what} in the image?"},
            **{"answer": "yes" if place else "no", "image_source": "p", "image": encoded(12)},
            "category": category,
        }
        for category in ("popular", "random", "adversarial")
        for place, what in enumerate(("cat", "dog"))
    ]
    monkeypatch.setattr(pope, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    mirrored, official = pope.load(None), pope.load(data)
    facts = [
        [(one.id, one.prompt, one.answers, one.group) for one in x] for x in (mirrored, official)
    ]
    assert facts[0] == facts[1]
    assert mirrored[0].image.read() == picture_bytes(12)


def test_seed_mirror_shows_the_middle_frame_of_a_video(tmp_path, monkeypatch):
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    row = {**choices, "question_id": "1", "question": "What?", "answer": "A", "data_type": "video"}
    rows = [{**row, "question_type_id": 2, "image": [encoded(place) for place in range(5)]}]
    monkeypatch.setattr(seed, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    assert seed.load(None)[0].image.read() == picture_bytes(2)


def test_sqa_mirror_tells_questions_without_a_picture(tmp_path, monkeypatch):
    row = {"question": "Why?", "choices": ["a", "b"], "answer": 1, "hint": "", "subject": "s"}
    rows = [{**row, "image": encoded(1)}, {**row, "image": None}]
    monkeypatch.setattr(sqa, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    assert [item.id for item in sqa.load(None)] == ["row0"]
    assert [item.image is None for item in sqa.load_full(None)] == [False, True]


def test_vqav2_mirror_gives_the_same_items_as_the_files(data, tmp_path, monkeypatch):
    row = {"question_type": "what", "multiple_choice_answer": "red", "answer_type": "other"}
    row |= {"answers": people(PEOPLE), "image_id": 5, "question_id": 1, "question": "Color?"}
    rows = [{**row, "image": encoded(13)}]
    monkeypatch.setattr(vqav2, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    mirrored, official = vqav2.load(None), vqav2.load(data)
    assert facts(mirrored) == facts(official)
    assert mirrored[0].details == official[0].details
    assert mirrored[0].image.read() == official[0].image.read()


def test_vqav2_mirror_of_a_test_split_has_questions_without_answers(tmp_path, monkeypatch):
    row = {"question_type": None, "answers": None, "answer_type": None, "image_id": 5}
    rows = [{**row, "question_id": 9, "question": "Why?", "image": encoded(1)}]
    monkeypatch.setattr(vqav2, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    (item,) = vqav2.load(None)
    assert (item.id, item.answers) == ("9", ())


def test_vizwiz_mirror_gives_the_same_items_as_the_files(data, tmp_path, monkeypatch):
    rows = [
        {
            **{"question_id": f"VizWiz_val_{place}", "image": encoded(2), "question": question},
            **{"answers": answers, "category": kind},
        }
        for place, (question, answers, kind) in enumerate(
            [("Color?", PEOPLE, "other"), ("What?", ["unanswerable"] * 10, "unanswerable")]
        )
    ]
    monkeypatch.setattr(vizwiz, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    assert facts(vizwiz.load(None)) == facts(vizwiz.load(data))
    rows[0]["question"] = "what is in MY hand?"  # lmms-eval would write "What is in my hand?"
    monkeypatch.setattr(vizwiz, "MIRRORS", (save_mirror(tmp_path / "m2", rows),))
    assert vizwiz.load(None)[0].prompt.startswith("what is in MY hand?\n")


def test_textvqa_mirror_with_and_without_ocr_words(data, tmp_path, monkeypatch):
    shared = {"image_id": "aa", "ocr_tokens": ["Ford", "1998"], "image": encoded(4)}
    rows = [
        {**shared, "question_id": 7, "question": "What brand?", "answers": PEOPLE},
        {**shared, "question_id": 8, "question": "Year?", "answers": ["1998"] * 10},
    ]
    monkeypatch.setattr(textvqa, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    assert facts(textvqa.load(None)) == facts(textvqa.load(data))
    assert facts(textvqa.load(None, with_ocr=True)) == facts(textvqa.load(data, with_ocr=True))


@pytest.mark.parametrize("name", ["mmbench", "mmbench-cn"])
def test_mmbench_mirror_gives_the_same_items_as_the_files(name, data, tmp_path, monkeypatch):
    rows = []
    for item in BENCHES[name].load(data):
        row = dict(zip("ABCD", item.options, strict=True))
        row |= {"index": item.id, "question": item.question, "answer": item.answers[0]}
        row |= {"hint": "nan", "category": item.category, "L2-category": "CP"}
        rows.append({**row, "image": {"bytes": item.image.read(), "path": None}})
    attribute = {"mmbench": "MIRRORS", "mmbench-cn": "MIRRORS_CN"}[name]
    mirror = save_mirror(tmp_path / "m", rows)
    monkeypatch.setattr(mmbench, attribute, (mirror,))
    mirrored, official = BENCHES[name].load(None), BENCHES[name].load(data)
    assert facts(mirrored) == facts(official)
    assert [one.details for one in mirrored] == [one.details for one in official]
    assert mirrored[-1].image.read() == official[-1].image.read()


def test_mmbench_mirror_rows_have_absent_options_as_words_and_numbers_as_index(
    tmp_path, monkeypatch
):
    row = {"question": "Round?", "hint": "Look.", "category": "c", "L2-category": "CP", "C": "nan"}
    row |= {"D": "nan", "image": encoded(1)}
    rows = [
        {**row, "index": 7, "A": "yes", "B": "no", "answer": "A"},
        {**row, "index": 1_000_007, "A": "no", "B": "yes", "answer": "B"},
    ]
    monkeypatch.setattr(mmbench, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    items = mmbench.load(None)
    assert [item.options for item in items] == [("yes", "no"), ("no", "yes")]
    assert {item.group for item in items} == {"7"}
    assert items[0].prompt.startswith("Look.\nRound?\nA. yes\nB. no\n")
    assert mmbench.summarize(judged(mmbench, items, ["A", "B"]))["by_l2"] == {"CP": 1}


def test_mme_mirror_gives_the_same_items_as_the_files(data, tmp_path, monkeypatch):
    rows = []
    for place, question in enumerate(
        ("Is it a cat?", "Is it a dog?")
    ):  # pairs need not be adjacent
        for category, stem in (("existence", "000"), ("OCR", "001"), ("code_reasoning", "002")):
            ending = " Please answer yes or no."
            row = {"question_id": f"{category}/{stem}.png", "question": question + ending}
            row |= {"answer": "No" if place else "Yes", "category": category}
            rows.append({**row, "image": encoded(5)})
    monkeypatch.setattr(mme, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    plain = {(one.group, one.prompt, one.answers, one.category) for one in mme.load(data)}
    mirrored = mme.load(None)
    found = {
        (one.group.removesuffix(".png"), one.prompt, one.answers, one.category) for one in mirrored
    }
    assert found == plain
    result = mme.summarize(judged(mme, mirrored, [one.answers[0] for one in mirrored]))
    assert result["score"] == 400
    assert result["cognition"]["score"] == 200


def test_mmmu_mirror_gives_the_same_items_as_the_files(data, tmp_path, monkeypatch):
    row = {"image_1": encoded(8), "image_2": None, "explanation": "", "subfield": "s"}
    rows = [
        {
            **{"id": "validation_Art_Theory_1", "question": "Which <image 1>?", **row},
            **{"options": "['cat', 'it\\'s a dog']", "answer": "B"},
            "question_type": "multiple-choice",
        },
        {
            **{"id": "validation_Math_2", "question": "How many?", **row, "options": "[]"},
            **{"question_type": "open", "answer": "['3', 'three']"},
            "image_2": encoded(12),
        },
    ]
    mirror = save_mirror(tmp_path / "m", rows, "image_1", "image_2")
    monkeypatch.setattr(mmmu, "MIRRORS", (mirror,))
    mirrored, official = mmmu.load(None), mmmu.load(data)
    assert facts(mirrored) == facts(official)
    assert mirrored[0].image.read() == official[0].image.read()
    for items in (mirrored, official):
        assert [len(item.more_images) for item in items] == [0, 1]
        assert items[1].more_images[0].read() == picture_bytes(12)
    assert all(item.more_images == () for item in BENCHES["mmmu-first"].load(data))


def test_mmvet_mirror_gives_the_same_items_as_the_files(data, tmp_path, monkeypatch):
    row = {"question_id": "v1_0", "question": "What is x?", "answer": "-1 <AND> -5"}
    rows = [{**row, "image_source": "web", "capability": "ocr,math", "image": encoded(9)}]
    monkeypatch.setattr(mmvet, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    mirrored, official = mmvet.load(None), mmvet.load(data)
    assert facts(mirrored) == facts(official)
    assert mmvet.judge_prompt(mirrored[0], "x") == mmvet.judge_prompt(official[0], "x")


def test_llava_bench_mirror_gives_the_same_judge_prompts_as_the_files(data, tmp_path, monkeypatch):
    rows = [
        {
            **{"question_id": place, "question": f"Question {place}?", "category": kind},
            **{"image_id": "001.jpg", "caption": "A lake.", "gpt_answer": f"Reference {place}."},
            "image": encoded(10),
        }
        for place, kind in enumerate(("conv", "detail"))
    ]
    monkeypatch.setattr(llava_w, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    mirrored, official = llava_w.load(None), llava_w.load(data)
    assert facts(mirrored) == facts(official)
    prompts = [[llava_w.judge_prompt(one, "x") for one in some] for some in (mirrored, official)]
    assert prompts[0] == prompts[1]


def test_a_moved_mirror_is_found_under_either_owner(tmp_path, monkeypatch):
    local = save_mirror(tmp_path / "m", [{"question": "Why?", "image": encoded(1)}])
    load, asked = datasets.load_dataset, []

    def hub(name, config, split):
        asked.append(name)
        if name != "lmms-lab/GQA":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} is not in the cache")
        return load(local.name, None, split="train")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert len(Mirror("GQA", "a").open()) == 1
    assert asked == ["lmms-lab-encoder/GQA", "lmms-lab/GQA"]
    with pytest.raises(MirrorError, match=r"lmms-lab-encoder/POPE.*lmms-lab/POPE.*--data"):
        Mirror("POPE").open()


def test_pictures_stay_encoded_until_they_are_read(tmp_path):
    table = save_mirror(tmp_path / "m", [{"question": "?", "image": encoded(1)}]).open()
    assert table.features["image"].decode is False
    frames = [{"question": "?", "image": [encoded(1), encoded(2)]}]
    table = save_mirror(tmp_path / "f", frames).open()
    assert table.features["image"].feature.decode is False


def test_a_row_without_its_picture_is_an_error_that_names_it(tmp_path, monkeypatch):
    row = {"question_type": "what", "answers": people(PEOPLE), "answer_type": "other"}
    row |= {"image_id": 5, "question": "Color?"}
    rows = [{**row, "question_id": 1, "image": encoded(1)}]
    rows.append({**row, "question_id": 2, "image": None})
    monkeypatch.setattr(vqav2, "MIRRORS", (save_mirror(tmp_path / "m", rows),))
    with pytest.raises(ValueError, match="VQAv2 mirror row 1: the row has no image"):
        vqav2.load(None)[1].image.read()
