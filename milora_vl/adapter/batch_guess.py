"""What a training batch will hold, judged from the texts of the records."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from milora_vl.adapter import cost
from milora_vl.config import DataSection

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_TURN = 5  # marks of the prompt style


def guess_load(
    data: DataSection, config: PreTrainedConfig, training: dict[str, Any]
) -> tuple[cost.TrainingLoad, int | None, list[str]]:
    """Guess what a micro-batch holds.

    Args:
        data: Names the record files, which may be absent.
        config: Of the model.
        training: Keys of ``TrainingArguments``.

    Returns:
        The load, the number of samples (None without records), and notes for people.
    """
    vision = getattr(config, "vision_config", None)
    image_tokens = getattr(config, "image_seq_length", 0) if vision else 0
    patch = getattr(vision, "patch_size", 14)
    side = image_tokens**0.5 if image_tokens else getattr(vision, "image_size", 0) / patch
    per_device = training.get("per_device_train_batch_size", 8)
    files = [Path(name) for name in data.train]
    if not all(file.exists() for file in files):
        notes = [f"the records are not here: every sample counted as {data.max_length} tokens long"]
        load = cost.TrainingLoad(per_device, data.max_length, float(bool(vision)), int(side**2))
        return load, None, notes
    texts = [text for file in files for text in _read_texts(file)[: data.limit]]
    characters = sum(len(text) for text, _, _ in texts)
    turns, pictures = sum(n for _, n, _ in texts), sum(has for _, _, has in texts)
    mean = (characters / CHARACTERS_PER_TOKEN + TOKENS_PER_TURN * turns) / max(len(texts), 1)
    mean += image_tokens * pictures / max(len(texts), 1)
    tokens = min(mean, data.max_length)
    notes = [
        f"{len(texts):,} samples of about {tokens:.0f} tokens ({CHARACTERS_PER_TOKEN} characters a "
        "token); seconds and memory are good to about a factor of two, for one process"
    ]
    load = cost.TrainingLoad(per_device, tokens, pictures / max(len(texts), 1), int(side**2))
    return load, len(texts), notes


def _read_texts(file: Path) -> list[tuple[str, int, bool]]:
    """Return all text, the number of turns and whether there is a picture, for every record."""
    content = file.read_text(encoding="utf-8")
    is_list = content.lstrip().startswith("[")
    lines = [] if is_list else content.splitlines()
    records = json.loads(content) if is_list else [json.loads(x) for x in lines if x.strip()]
    found = []
    for record in records:
        turns = record.get("conversations") or record.get("messages") or []
        text = "".join(str(turn.get("value") or turn.get("content") or "") for turn in turns)
        found.append((text, len(turns), bool(record.get("image") or record.get("images"))))
    return found


def count_steps(training: dict[str, Any], samples: int | None, batch: int) -> int | None:
    """Return the optimiser steps of one process, or None if the number of samples is unknown."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    if samples is None:
        return None
    return int(-(-samples // batch) * training.get("num_train_epochs", 3))
