"""Which checkpoint a stopped training goes on from."""

import json
from pathlib import Path


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, or None.

    ``trainer_state.json`` is the last file of a checkpoint; one that was cut off by a full disk or
    an interruption lacks it or holds half of it, and an older one is taken.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return checkpoint
    return None
