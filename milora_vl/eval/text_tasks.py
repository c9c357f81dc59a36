"""Text-only tasks by lm-eval-harness, asked of the live model with its adapter."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# the metric that papers report, first choice first
_PREFERRED = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")
_NOT_METRICS = ("alias", "sample_len", "sample_count", "name")
_Z_95 = 1.96


def run_text_tasks(
    vlm: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval-harness on the model as it is in memory; nothing is merged or saved.

    Args:
        vlm: Has ``model`` and ``tokenizer``.
        tasks: Names as the harness knows them, such as "arc_easy" or "gsm8k".
        batch_size: Sequences in one forward pass.
        limit: Most questions of a task.
        include_path: Folder of further task files.

    Returns:
        By "lm:TASK" an entry in the form of the other benches; every metric of the harness is under
        ``metrics``. The interval is 1.96 standard errors to either side.

    Raises:
        RuntimeError: If lm-eval is not installed.
        ValueError: If a task is unknown.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError("text-only tasks need lm-eval: pip install 'milora-vl[text]'") from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists all"
        )
    was_training = vlm.model.training
    vlm.model.eval()
    try:
        with torch.no_grad():
            live = HFLM(
                pretrained=vlm.model,
                tokenizer=vlm.tokenizer,
                backend="causal",
                batch_size=batch_size,
            )
            started = time.perf_counter()
            found = simple_evaluate(
                model=live, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
            )
    finally:
        vlm.model.train(was_training)
    n_total = sum(counts["effective"] for counts in found["n-samples"].values())
    seconds = (time.perf_counter() - started) / max(1, n_total)
    return {f"lm:{name}": _entry(name, found, seconds) for name in tasks}


def _entry(name: str, found: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    values = found["results"][name]
    metrics = {
        key: value
        for key, value in values.items()
        if isinstance(value, (int, float)) and key not in _NOT_METRICS
    }
    chosen = next((key for key in _PREFERRED if key in metrics), None)
    chosen = chosen or next(key for key in metrics if "_stderr" not in key)
    score = float(metrics[chosen])
    error = metrics.get(chosen.replace(",", "_stderr,", 1))
    half = None if error is None else _Z_95 * float(error)
    return {
        "metric": chosen.split(",")[0],
        "score": score,
        "interval_95": None if half is None else [score - half, score + half],
        "blind": None,
        "blind_interval_95": None,
        "majority": None,
        "n": found["n-samples"].get(name, {}).get("effective", 0),
        "by_category": {},
        "metrics": metrics,
        "seconds_per_item": seconds,
        "version": found.get("versions", {}).get(name),
        "note": "text only, by lm-eval-harness",
    }
