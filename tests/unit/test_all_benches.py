"""Laws of every bench: official layout, mirror, exact prompts, perfect and failed answers."""

from pathlib import Path

import datasets
import pytest
from eval_models import judged, picture_bytes
from official_layouts import write_all

from milora_vl.eval.bench_run import judge_all
from milora_vl.eval.benches import BENCHES, gqa, mmmu, pope, seed, sqa
from milora_vl.eval.items import Answer, EvaluationError
from milora_vl.eval.mirrors import Mirror, MirrorError
from milora_vl.eval.published import LLAVA_15_7B, published_scores

GOLDEN = Path(__file__).parents[1] / "golden" / "bench_prompts.txt"
JUDGED = ("mmvet", "llava-w")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("benches"))


def test_prompts_of_every_bench_are_as_recorded(data, golden):
    parts = [
        f"=== {name}: {item.id}\n{item.prompt}\n"
        for name, bench in BENCHES.items()
        for item in bench.load(data)[:3]
    ]
    golden(GOLDEN, "\n".join(parts))


@pytest.mark.parametrize("name", BENCHES)
def test_every_official_layout_is_found_with_its_pictures(name, data):
    items = BENCHES[name].load(data)
    assert items
    assert len({item.id for item in items}) == len(items)
    for item in items:
        if item.image is not None:
            assert len(item.image.read()) > 50


@pytest.mark.parametrize("name", [name for name in BENCHES if name not in JUDGED])
def test_right_answers_get_everything_and_failed_samples_nothing(name, data):
    bench = BENCHES[name]
    items = bench.load(data)
    texts = [item.answers[0] if len(item.answers) < 10 else item.answers[-1] for item in items]
    rows = judged(bench, items, texts)
    result = bench.summarise(rows)
    top = result.get("maximum", 1.0)
    assert result["score"] == pytest.approx(top)
    assert result["interval_95"] == pytest.approx([top, top])
    assert 0 <= bench.majority(items) <= top
    failed = bench.summarise(judged(bench, items, [None] * len(items)))
    assert failed["score"] == 0
    sums = bench.headline_sums(rows).sum(axis=0, keepdims=True)
    assert bench.headline(sums)[0] == pytest.approx(result["score"])


@pytest.mark.parametrize("name", BENCHES)
def test_predictions_join_by_id_and_a_missing_one_is_an_error(name, data, tmp_path):
    bench = BENCHES[name]
    items = bench.load(data)
    answers = {item.id: Answer(f"said {item.id}") for item in reversed(items)}
    rows = judge_all(bench, items, answers)
    assert [row.text for row in rows] == [f"said {item.id}" for item in items]
    del answers[items[0].id]
    with pytest.raises(EvaluationError, match="1 items without a prediction"):
        judge_all(bench, items, answers)
    texts = {item.id: None for item in items} | {items[-1].id: "Yes"}
    paths = bench.write_submission(items, texts, tmp_path)
    assert all(path.stat().st_size > 0 for path in paths)


@pytest.mark.parametrize("name", [name for name in BENCHES if name != "custom"])
def test_without_files_the_error_says_what_was_looked_for(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        BENCHES[name].load(tmp_path)


def test_offline_mirrors_say_what_to_do():
    with pytest.raises(MirrorError, match=r"official files here.*--data"):
        gqa.load(None)
    with pytest.raises(FileNotFoundError, match=r"custom.*--data"):
        BENCHES["custom"].load(None)


def save_mirror(folder, rows):
    """A folder of tables that ``load_dataset`` opens as it opens a hub mirror."""
    table = datasets.Dataset.from_list(rows)
    is_list = isinstance(rows[0]["image"], list) if "image" in rows[0] else False
    image = datasets.List(datasets.Image()) if is_list else datasets.Image()
    if "image" in rows[0]:
        table = table.cast_column("image", image)
    folder.mkdir(exist_ok=True)
    table.to_parquet(str(folder / "train.parquet"))
    return Mirror(str(folder), None, "train")


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


def test_mmmu_files_may_be_named_one_by_one(data):
    path = next((data / "mmmu").rglob("*.parquet"))
    assert [item.id for item in mmmu.load(path)] == [item.id for item in mmmu.load(data)]


def test_published_scores_are_shown_for_that_model_only():
    assert published_scores("llava-hf/llava-1.5-7b-hf", "mmbench")["milora"] == 66.1
    assert published_scores("/models/llava-v1.5-7b", "gqa")["lora"] == 63.0
    assert published_scores("llava-hf/llava-1.5-13b-hf", "mmbench") == {}
    assert published_scores("runs/demo", "mmbench") == {}
    assert set(LLAVA_15_7B) <= set(BENCHES)
    full = [LLAVA_15_7B[name]["full"] for name in ("vqav2", "gqa", "vizwiz", "sqa", "pope")]
    assert full == [78.5, 62.0, 50.0, 66.8, 85.9]


def test_a_family_of_its_own_prompts_answers_a_whole_bench(tmp_path: Path) -> None:
    from family_models import build_checkpoint

    from milora_vl.eval.evaluation import evaluate
    from milora_vl.model.load import load_vlm

    write_all(tmp_path / "data")
    checkpoint = build_checkpoint("qwen2_vl", tmp_path / "checkpoint")
    results = evaluate(
        load_vlm(checkpoint), ["custom"], tmp_path / "data", tmp_path / "out", progress=False
    )
    assert results["benches"]["custom"]["n"] > 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= results["benches"]["custom"]["n"]
