"""Laws of the runtime: precision is measured, and never changes unasked."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from milora_vl import runtime
from milora_vl.config import ConfigError, parse_config
from milora_vl.eval.__main__ import choose_autocast
from milora_vl.eval.evaluation import JOURNAL
from milora_vl.pipeline import record_environment, with_precisions
from milora_vl.runtime import (
    LayerShape,
    choose_precision,
    count_layer_shapes,
    measure_precisions,
)

SHAPES = (LayerShape(256, 256, 4), LayerShape(512, 256, 2))


def test_auto_takes_the_faster_precision() -> None:
    rates = measure_precisions(SHAPES, backward=True)
    chosen = choose_precision("auto", lambda: SHAPES, "cpu")
    assert set(rates) == {"float32", "bfloat16"}
    assert chosen.gflops == rates
    assert chosen.bf16 == (rates["bfloat16"] > 1.05 * rates["float32"])
    assert all(f"{rate:g}" in chosen.reason for rate in rates.values())


def test_where_bfloat16_is_slow_auto_avoids_it_and_true_is_warned_of() -> None:
    """The processor is held to instructions without bfloat16, as most laptops are."""
    code = """
import logging
from milora_vl.runtime import LayerShape, choose_precision
logging.basicConfig(level=logging.INFO)
shapes = (LayerShape(512, 512, 1),)
assert not choose_precision("auto", lambda: shapes, "cpu").bf16
assert choose_precision(True, lambda: shapes, "cpu", name="training.bf16").bf16
"""
    slow = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | slow | {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "times slower" in line]
    assert len(warnings) == 1
    assert "training.bf16: true" in warnings[0]
    assert "auto" in warnings[0]


def test_measuring_leaves_the_random_state_of_the_training_alone() -> None:
    before = torch.get_rng_state()
    measure_precisions((LayerShape(64, 32, 1),), backward=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_measured_where_nothing_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> tuple[LayerShape, ...]:
        raise AssertionError("looked at the model")

    assert not choose_precision(False, refuse, "cpu").bf16
    assert choose_precision(True, refuse, "cuda").bf16
    with pytest.raises(ValueError, match="true, false or auto"):
        choose_precision("maybe", refuse, "cpu")


def test_bfloat16_weights_decide_for_bfloat16_whatever_is_faster() -> None:
    chosen = choose_precision("auto", lambda: SHAPES, "cpu", weights=torch.bfloat16)
    assert chosen.bf16
    assert chosen.gflops == measure_precisions(SHAPES, backward=True)


def test_layers_are_counted_without_the_head() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "lm_head": nn.Linear(4, 99)})
    assert count_layer_shapes(model.to("meta")) == (LayerShape(8, 4, 2),)


@pytest.mark.parametrize("section", ["training", "alignment.training"])
def test_other_words_for_bf16_are_refused_with_the_choices(section: str) -> None:
    values = {
        "model": {"path": "x", "prompt_style": "chatml"},
        "data": {"train": "x"},
        "training": {"bf16": "auto"},
        "alignment": {"training": {"bf16": "auto"}},
    }
    parse_config(values)
    (values["training"] if section == "training" else values["alignment"]["training"])["bf16"] = (
        "maybe"
    )
    with pytest.raises(ConfigError, match=f"{section}: bf16: 'maybe'.*true, false or auto"):
        parse_config(values)


def test_a_run_that_goes_on_keeps_the_precision_of_its_start(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse_config(
        {
            "model": {"path": str(tiny_checkpoint), "prompt_style": "chatml", "device": "cpu"},
            "data": {"train": "x"},
            "training": {"bf16": "auto"},
        }
    )
    file = tmp_path / "environment.json"
    with caplog.at_level(logging.INFO, logger="milora_vl"):
        first = record_environment(config, file)["training"]
    assert str(first.gflops["bfloat16"]) in caplog.text
    assert with_precisions(config, {"training": first}).training["bf16"] is first.bf16
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["precision"]["training"]["gflops"] == first.gflops
    facts["precision"]["training"]["bf16"] = not first.bf16  # as found on another day
    file.write_text(json.dumps(facts), encoding="utf-8")
    assert record_environment(config, file)["training"].bf16 is not first.bf16


def test_an_evaluation_that_goes_on_keeps_its_precision(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.device, model.dtype = torch.device("cpu"), torch.float32
    first = choose_autocast("auto", model, tmp_path)
    file = tmp_path / "precision.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert first == (torch.bfloat16 if kept["bf16"] else None)
    file.write_text(json.dumps(kept | {"bf16": not kept["bf16"]}), encoding="utf-8")
    (tmp_path / JOURNAL).write_text("", encoding="utf-8")  # it was interrupted
    assert choose_autocast("auto", model, tmp_path) != first
    assert choose_autocast("none", model, tmp_path) is None
    assert choose_autocast("float16", model, tmp_path) == torch.float16


@pytest.mark.parametrize(
    ("bfloat16_rate", "expected"), [(5.0, torch.float32), (90.0, torch.bfloat16)]
)
def test_stored_bfloat16_runs_in_float32_where_that_is_faster(
    bfloat16_rate: float, expected: torch.dtype, make_tiny_vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"float32": 50.0, "bfloat16": bfloat16_rate}
    monkeypatch.setattr(runtime, "measure_precisions", lambda shapes, backward: rates)
    model = make_tiny_vlm().bfloat16()
    before = model.lm_head.weight.clone()
    runtime.prefer_faster_weights_(model)
    assert model.dtype == expected
    assert torch.equal(model.lm_head.weight.bfloat16(), before)
