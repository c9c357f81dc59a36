"""Laws of the forecast: it adds up, learns from what was seen, and warns of too little memory."""

import contextlib
import json
import logging
import time
from pathlib import Path

import pytest

from milora_vl import forecast, pipeline
from milora_vl.config import load_config

ALL = dict.fromkeys(forecast.STAGES, False)
WORK = forecast.Work(training=100e12, alignment=10e12, evaluation=20e12)


def test_a_faster_computer_needs_less_and_done_stages_need_nothing() -> None:
    slow = forecast.guess_seconds(WORK, 50.0, ALL)
    fast = forecast.guess_seconds(WORK, 500.0, ALL)
    assert list(slow) == list(forecast.STAGES)
    assert all(slow[name] > fast[name] for name in forecast.PRODUCT_STAGES)
    some = forecast.guess_seconds(WORK, 50.0, ALL | {"data": True, "base": True})
    assert some == slow | {"data": 0.0, "base": 0.0}


def test_work_grows_with_samples_tokens_and_questions() -> None:
    weights = forecast.ModelWeights(tower=10, projector=1, language_model=100)
    one = forecast.training_operations(weights, 1, tokens=7, images=1, patches=4)
    assert forecast.training_operations(weights, 5, 7, 1, 4) == 5 * one
    assert forecast.training_operations(weights, 1, 14, 1, 4) > 1.5 * one
    asked = forecast.evaluation_operations(weights, 10, 4)
    assert forecast.evaluation_operations(weights, 20, 4) == 2 * asked
    assert forecast.evaluation_operations(weights, 10, 4, blind=True) > asked


def test_the_products_of_the_stages_are_said_with_their_time_at_a_rate() -> None:
    assert forecast.describe_work(WORK, None) == (
        "products: 150 TFLOP: base 10, before 20, finetuning 100, after 20"
    )
    text = forecast.describe_work(WORK, 100.0).splitlines()[1]
    seconds = forecast.guess_seconds(WORK, 100.0, ALL)
    assert f"about {sum(seconds.values()) / 60:.0f} min" in text
    assert text.startswith("at 100 GFLOP/s")
    assert "finetuning 17" in text  # 1000 s of products and the start


def test_the_products_of_the_demo_follow_its_steps() -> None:
    config = load_config("configs/demo_cpu.yaml")
    more = load_config("configs/demo_cpu.yaml", ["training.max_steps=1000"])
    steps = config.training["max_steps"]
    work, longer = pipeline.count_work(config), pipeline.count_work(more)
    assert longer.training == pytest.approx(work.training * 1000 / steps)
    assert (longer.alignment, longer.evaluation) == (work.alignment, work.evaluation)


def test_the_whole_is_the_sum_and_is_said_in_minutes() -> None:
    guesses = {"data": 120.0, "base": 240.0, "before": 180.0, "finetuning": 720.0, "after": 180.0}
    text = str(forecast.Schedule(guesses, None))
    assert text == (
        "about 24 min left on this computer: data 2, base 4, before 3, finetuning 12, after 3"
    )


def test_what_a_stage_took_corrects_the_stages_to_come(tmp_path: Path) -> None:
    schedule = forecast.Schedule({"before": 0.1, "finetuning": 100.0, "after": 0.1}, None)
    with schedule.stage("before"):
        time.sleep(0.4)  # four times as long as was guessed
    assert schedule.remaining["after"] > 0.35  # the same questions again
    assert schedule.remaining["finetuning"] > 150  # a slower computer than was thought


def test_times_of_several_calls_add_up_beside_the_first_guess(tmp_path: Path) -> None:
    file = tmp_path / "timing.json"
    for guess in (100.0, 60.0):
        schedule = forecast.Schedule({"finetuning": guess}, file)
        with contextlib.suppress(KeyboardInterrupt), schedule.stage("finetuning"):
            time.sleep(0.15)
            raise KeyboardInterrupt
    kept = json.loads(file.read_text(encoding="utf-8"))["finetuning"]
    assert kept["guessed_s"] == 100.0
    assert kept["seconds"] >= 0.3


def test_too_little_memory_is_said_with_what_to_change(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config("configs/demo_cpu.yaml")
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(pipeline, "memory_gib", lambda: 999.0)
        pipeline.warn_of_memory(config)
        assert not caplog.text
        monkeypatch.setattr(pipeline, "memory_gib", lambda: 0.5)
        pipeline.warn_of_memory(config)
    assert "0.5 GiB are free" in caplog.text
    assert "training.per_device_train_batch_size=" in caplog.text
    assert "gradient_checkpointing=true" in caplog.text
