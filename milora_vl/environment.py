"""What a result depends on besides its config and data: versions, commit, machine, seed."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from milora_vl.adapter.portable import installed_versions


def describe_environment(seed: int) -> dict[str, Any]:
    """Collect versions, commit, machine and seed."""

    def git(*words: str) -> str:
        try:
            result = subprocess.run(
                ["git", *words],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parent,
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        return result.stdout.strip()

    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": installed_versions(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "seed": seed,
    }
