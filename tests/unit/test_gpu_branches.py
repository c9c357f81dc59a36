"""Code that differs by device: each branch is listed in docs/gpu.md, and entered by a test.

Where a branch asks what torch knows of CUDA, that answer is put in its mouth; where it asks for the
device of a tensor, a tensor on "meta" stands for one that is not on the CPU.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from milora_vl import plan
from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.decompose import count_workers
from milora_vl.adapter.minor_svd import pack
from milora_vl.config import MiloraConfig, load_config
from milora_vl.environment import describe_environment
from milora_vl.model import load
from milora_vl.pipeline import guess_stages, warn_of_memory
from milora_vl.runtime import Precision, prefer_faster_weights_, resolve_device
from milora_vl.training import arguments
from milora_vl.training.callbacks import peak_memory

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"


def asks_for_device(node: ast.AST) -> bool:
    """Return whether an expression names CUDA or mps, or asks for the type of a device."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(side, ast.Constant) and side.value == "cpu" for side in sides)
    if isinstance(node, ast.Constant):
        return node.value in ("cuda", "mps")
    if not isinstance(node, ast.Attribute):
        return False
    owner = node.value
    is_device = getattr(owner, "attr", "") == "device" or getattr(owner, "id", "") == "device"
    return node.attr in ("cuda", "is_cuda", "mps") or (node.attr == "type" and is_device)


def functions_by_device() -> set[tuple[str, str]]:
    found = set()
    for path in sorted((ROOT / "milora_vl").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and any(
                asks_for_device(node) for node in ast.walk(function)
            ):
                found.add((path.relative_to(ROOT).as_posix(), function.name))
    return found


def rows() -> list[tuple[str, str, str]]:
    """Return (file, function, tests) of the table."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^\| `(milora_vl/[\w/]+\.py)` `(\w+)` \|.*\| (.*) \|$", text, re.MULTILINE)


def test_every_branch_by_device_is_in_the_page():
    listed = {(file, function) for file, function, _ in rows()}
    missing = functions_by_device() - listed
    assert not missing, f"docs/gpu.md lacks {sorted(missing)}"
    for file, function in listed:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*def {function}\(", text, re.MULTILINE), f"no {function} in {file}"


def test_the_tests_that_the_page_names_exist():
    for file, function, tests in rows():
        named = re.findall(r"`(tests/[\w/]+\.py)` `(\w+)`", tests)
        assert named, f"{file} {function}: no test is named"
        for place, name in named:
            text = (ROOT / place).read_text(encoding="utf-8")
            assert f"def {name}(" in text, f"no {name} in {place}"


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch say that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)


def test_a_gpu_is_chosen_named_and_measured(a_gpu, tiny_vlm):
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert describe_environment(0)["cuda"] == "some GPU"
    assert peak_memory()["peak_cuda_memory_gib"] == 3
    _, certificate = attach_milora(tiny_vlm, MiloraConfig(r=4), progress=False)
    assert certificate.peak_cuda_memory_gib == 3


def test_a_gpu_gets_pinned_memory_and_is_trained_on(a_gpu, monkeypatch, tmp_path):
    caught = {}

    def catch(**values):
        caught.update(values)
        raise InterruptedError  # to build them would start CUDA

    monkeypatch.setattr(arguments, "StageArguments", catch)
    with pytest.raises(InterruptedError):
        arguments.build_arguments({"tf32": True}, tmp_path, 0)
    assert caught["dataloader_pin_memory"] is True
    assert caught["use_cpu"] is False
    assert caught["tf32"] is True


def test_weights_go_straight_to_a_gpu(tiny_checkpoint, monkeypatch):
    caught = {}

    def catch(_path, **options):
        caught.update(options)
        raise LookupError  # there is no such device

    monkeypatch.setattr(load.AutoModelForImageTextToText, "from_pretrained", catch)
    with pytest.raises(LookupError):
        load.load_vlm(tiny_checkpoint, device="cuda:1")
    assert caught["device_map"] == {"": "cuda:1"}  # not through a whole model on the host


def test_what_is_tuned_for_cpus_is_left_alone_elsewhere():
    with torch.device("meta"):
        layer = nn.Linear(256, 256, bias=False)
    assert count_workers([layer]) == 1
    assert not pack(layer.weight).is_mkldnn
    layer.to(torch.bfloat16)
    prefer_faster_weights_(layer)
    assert layer.weight.dtype == torch.bfloat16


def test_no_time_and_no_host_memory_is_foretold_for_a_gpu(caplog):
    config = load_config("configs/llava15_7b_milora.yaml", ["model.device=cuda"])
    assert guess_stages(config, Precision(True, ""), {}) == {}
    warn_of_memory(config)
    assert not caplog.records


def test_a_plan_on_a_gpu_takes_its_measured_rate(monkeypatch):
    monkeypatch.setattr(plan, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(plan, "measure_flops", lambda dtype, device, **_: 1e14)
    found = plan.plan_run(load_config("configs/llava15_7b_milora.yaml"))
    assert found.gflops == (1e5, 1e5)
    assert found.step_seconds > 0
