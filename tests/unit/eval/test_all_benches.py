"""Laws of every bench: official layout, mirror, exact prompts, perfect and failed answers."""

from pathlib import Path

import pytest
from eval_models import judged
from official_layouts import write_all

from milora_vl.eval.benches import BENCHES, mmmu
from milora_vl.eval.evaluation import judge_all
from milora_vl.eval.items import Answer, EvaluationError
from milora_vl.eval.published import LLAVA_15_7B, published_scores
from milora_vl.eval.scoring import write_submission

GOLDEN = Path(__file__).parents[2] / "golden" / "bench_prompts.txt"
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
    result = bench.summarize(rows)
    top = result.get("maximum", 1.0)
    assert result["score"] == pytest.approx(top)
    assert result["interval_95"] == pytest.approx([top, top])
    assert 0 <= bench.majority(items) <= top
    failed = bench.summarize(judged(bench, items, [None] * len(items)))
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
    paths = write_submission(bench.submission(items, texts), tmp_path)
    assert all(path.stat().st_size > 0 for path in paths)


@pytest.mark.parametrize("name", [name for name in BENCHES if name != "custom"])
def test_without_files_the_error_says_what_was_looked_for(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        BENCHES[name].load(tmp_path)


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
