"""Laws of other systems: Windows has no ``resource``, Apple's GPUs no float64."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from milora_vl import runtime

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "milora_vl").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])
POSIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "pty"}


def test_no_file_needs_what_windows_lacks_to_be_imported():
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_ONLY & set(names), f"{path.name}: import it where it is used"


def test_the_peak_memory_is_known_without_resource(monkeypatch: pytest.MonkeyPatch):
    on_windows = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**30))
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it raises
    with pytest.raises(ImportError):
        runtime.peak_memory_gib()
    monkeypatch.setattr(psutil, "Process", lambda: on_windows)
    assert runtime.peak_memory_gib() == 3


class OnMps:
    """Stands for a tensor on Apple's GPU: there is no float64 until it is on the CPU."""

    device = SimpleNamespace(type="mps")

    def __init__(self, values: torch.Tensor):
        self.values = values

    def cpu(self) -> torch.Tensor:
        return self.values

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_float64_is_taken_on_the_cpu_where_the_device_has_none():
    values = torch.ones(2)
    assert runtime.to_float64(OnMps(values)).dtype == torch.float64
    assert runtime.to_float64(values).dtype == torch.float64


def test_only_the_runtime_makes_float64_tensors():
    for path in SOURCES:
        if path.name in ("runtime.py", "trainer.py"):  # the latter asks for the device itself
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                named = f"{getattr(node.value, 'id', '')}.{node.attr}"
                is_double = node.attr == "double" or named == "torch.float64"
                assert not is_double, f"{path.name}:{node.lineno}: use runtime.to_float64"
