"""Laws of the set-up script: only what is needed is installed, once, and nothing is taken away."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from milora_vl.data.fetch import MissingPackageError, need_packages

ROOT = Path(__file__).resolve().parents[2]
FAKE_PYTHON = """#!/bin/sh
if [ "$2" = pip ]; then echo "$@" >>"$PIP_LOG"; else "{}" "$@"; fi
"""


def installs(checkout: Path, extras: str) -> list[str]:
    """Source the script in a checkout with a fake pip; return what it was asked to install."""
    log = checkout / "pip.log"
    log.unlink(missing_ok=True)
    environment = os.environ | {"MILORA_NO_VENV": "", "PIP_LOG": str(log)}
    words = ["bash", "-euo", "pipefail", "-c", f". scripts/setup_env.sh {extras}; echo ready"]
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    assert "ready" in done.stdout, done.stderr
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script with a virtual environment whose python writes down what pip should do."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup_env.sh", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(sys.executable))
    python.chmod(0o755)
    (python.parent / "activate").write_text(f'PATH="{python.parent}:$PATH"\n')
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_extras_are_added_once_and_stay(checkout: Path) -> None:
    assert installs(checkout, "")[-1].endswith(str(checkout))
    assert installs(checkout, "") == []
    assert installs(checkout, "demo")[-1].endswith("[demo]")
    assert installs(checkout, "dev,demo")[-1].endswith("[dev,demo]")
    assert installs(checkout, "demo") == installs(checkout, "") == []
    (checkout / "pyproject.toml").write_text("# newer")
    assert installs(checkout, "")[-1].endswith("[dev,demo]")


def packages(key: str) -> set[str]:
    """Return the names of a list in pyproject.toml; Python 3.10 has no reader of its own."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(rf"^{key} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    return set(re.findall(r'"([\w-]+)', block[1]))


def test_training_installs_nothing_for_developers_or_the_demo() -> None:
    assert {"torch", "peft", "bitsandbytes", "tensorboard"} <= packages("dependencies")
    assert packages("demo") == {"gguf", "onnx", "resvg-py"}
    assert not packages("dependencies") & (packages("demo") | packages("dev") | {"jupyter"})
    assert "dev,demo" in (ROOT / "scripts/test.sh").read_text(encoding="utf-8")


def test_a_missing_package_is_named_with_its_command() -> None:
    need_packages("x", "json")
    with pytest.raises(MissingPackageError, match=r"no_such_package not installed.*\[demo\]"):
        need_packages("the demo", "json", "no_such_package")
