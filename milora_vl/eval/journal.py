"""Answers on disk as they come, so that an interrupted evaluation goes on where it was."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milora_vl.eval.items import Answer
from milora_vl.files import write_text_atomic

logger = logging.getLogger(__name__)

_VALUES_PER_WEIGHT = 64


class AnswerJournal:
    """One JSONL file: a line that says whose answers these are, then a line a batch of answers.

    A line is flushed to disk before the next batch is asked. One cut short by a crash is dropped.
    A file of another model, adapter or prompt style is set aside and a new one begun.

    Args:
        path: The file.
        identity: What the answers depend on besides the questions; compared as JSON.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """See the class."""
        self.path = path
        self._known: dict[str, Answer] = {}
        self._served: dict[str, float] = {}
        header = json.dumps({"identity": dict(identity)}, sort_keys=True)
        # a crash may cut a character in two; texts may hold other line breaks than "\n"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = [line for line in text.split("\n") if line]
        if lines and lines[0] == header:
            kept = [line for line in lines[1:] if self._take(line)]
            logger.info("%s: going on with %d answers of an earlier call", path, len(self._known))
        else:
            kept = []
            if lines:
                logger.warning("%s belongs to another model or adapter; starting afresh", path)
        write_text_atomic(path, "".join(f"{line}\n" for line in [header, *kept]))

    def _take(self, line: str) -> bool:
        try:
            entries = json.loads(line)
        except json.JSONDecodeError:
            return False  # the crash hit while this line was written
        self._known |= {digest: Answer(**values) for digest, values in entries.items()}
        return True

    def get(self, digest: str) -> Answer | None:
        """Return the answer to a question, or None if it was not asked yet."""
        answer = self._known.get(digest)
        if answer is not None:
            self._served[digest] = answer.seconds
        return answer

    @property
    def served_seconds(self) -> float:
        """What the answers given out so far had cost when they were asked, in seconds."""
        return sum(self._served.values())

    def record(self, answers: Mapping[str, Answer]) -> None:
        """Append the answers of a batch; on return they are on disk."""
        entries = {
            digest: {
                "text": answer.text,
                "n_tokens": answer.n_tokens,
                "ended": answer.ended,
                "seconds": round(answer.seconds, 6),
            }
            for digest, answer in answers.items()
            if answer.error is None
        }
        self._known |= {digest: answers[digest] for digest in entries}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entries, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self) -> None:
        """Delete the file: the evaluation is whole and its results hold every answer."""
        self.path.unlink(missing_ok=True)


def fingerprint_weights(model: torch.nn.Module) -> str:
    """Return a digest of a few values of every weight, adapters included, in well under a second.

    Training changes some of them; a copy of the same checkpoint has the same ones.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        values = weight.detach().flatten()
        step = max(1, len(values) // _VALUES_PER_WEIGHT)
        sample = values[::step][:_VALUES_PER_WEIGHT].float().cpu().numpy()
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(sample, dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]
