"""What a result depends on besides its config: versions, commit, machine, seed, data."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from milora_vl.adapter.portable import installed_versions


def describe_environment(seed: int, data_manifest: Path | None) -> dict[str, Any]:
    """Collect what a result depends on: versions, commit, machine, seed, data."""

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

    manifest = (
        json.loads(data_manifest.read_text(encoding="utf-8"))
        if data_manifest and data_manifest.exists()
        else None
    )
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": installed_versions(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "seed": seed,
        "data_manifest": manifest,
    }
