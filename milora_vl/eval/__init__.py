"""Evaluation: benches in their official file formats, with intervals and a blind baseline."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Give ``milora_vl.eval.evaluate`` on first use, so that ``answers`` alone stays light."""
    if name == "evaluate":
        from milora_vl.eval.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
