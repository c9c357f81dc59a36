"""What watches a training: metrics on disk, the best step, early stopping, checkpoints."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.adapter.portable import check_whole
from milora_vl.files import write_text_atomic
from milora_vl.runtime import peak_memory_gib
from milora_vl.training.resume import checkpoint_folders
from milora_vl.training.watch import StepWatch

logger = logging.getLogger(__name__)


class MetricsWriter(TrainerCallback):
    """Append every log to ``metrics.jsonl``, one object a line, with units in the keys."""

    NAMES = {"loss": "loss_nats_per_token", "eval_loss": "validation_loss_nats_per_token"}  # noqa: RUF012

    def __init__(
        self, path: Path, stage: str, details: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        """Write to ``path``; ``stage`` and what ``details`` measures go into every line."""
        self.path, self.stage, self.details = path, stage, details

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop this stage's lines after the step that training resumes from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if self._is_kept(line, state.global_step)]
        write_text_atomic(self.path, "".join(line + "\n" for line in kept))

    def _is_kept(self, line: str, step: int) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            return False  # half a line, from an interruption
        return entry["stage"] != self.stage or entry["step"] <= step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line; a value that is not finite is written as null.

        Raises:
            FloatingPointError: If a loss is not finite. A gradient norm may be infinite: a float16
                loss scaler finds its scale that way, see ``StepWatch``.
        """
        logs = logs or {}
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise FloatingPointError(
                    f"{name} is {logs[name]} at step {state.global_step}; lower the learning rate "
                    f"or check the data of the steps before; checkpoints are in {args.output_dir}"
                )
        if state.is_world_process_zero:
            entry: dict[str, Any] = {"stage": self.stage, "step": state.global_step}
            for name, value in logs.items():
                is_number = isinstance(value, float) and not math.isfinite(value)
                entry[self.NAMES.get(name, name)] = None if is_number else value
            if self.details and ("loss" in logs or "train_runtime" in logs):
                entry |= self.details()
            if "train_runtime" in logs:  # the last line of a training
                entry |= peak_memory()
            self.write(entry)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def peak_memory() -> dict[str, float]:
    """Return the largest resident memory of this process so far, and of its GPU, in GiB."""
    found = {"peak_memory_gib": peak_memory_gib()}
    if torch.cuda.is_available():
        found["peak_cuda_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def best_metric_name(args: TrainingArguments) -> str:
    """Return the key under which the metric of the best checkpoint is logged."""
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def evaluations_since_best(args: TrainingArguments, state: TrainerState) -> int:
    """Count the evaluations after the best one; the history in a checkpoint has all of them.

    The evaluation before the first step has no checkpoint and does not count.
    """
    name = best_metric_name(args)
    values = [row[name] for row in state.log_history if name in row and row.get("step", 0) > 0]
    if not values:
        return 0
    best = max(values) if args.greater_is_better else min(values)
    return len(values) - 1 - values.index(best)


class BestStep(TrainerCallback):
    """Save every new best step, and stop when there has been none for a while.

    Both depend only on the history that every checkpoint holds, so a resumed run does the same.
    """

    def __init__(self, patience: int | None) -> None:
        """Stop after ``patience`` evaluations in a row without a new best; None for never."""
        self.patience = patience

    def has_waited(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Return whether the patience is exhausted."""
        return bool(self.patience) and evaluations_since_best(args, state) >= self.patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Decide whether to save and whether to stop."""
        is_measured = best_metric_name(args) in (metrics or {})
        if not is_measured or state.global_step == 0:
            return
        # transformers saves at save_steps only, which may miss the best step
        if args.load_best_model_at_end and evaluations_since_best(args, state) == 0:
            control.should_save = True
        if self.has_waited(args, state):
            logger.info(
                "stopped early at step %d: no better %s in %d evaluations",
                *(state.global_step, best_metric_name(args), self.patience),
            )
            control.should_training_stop = True


class NothingLeftToTrain(Exception):  # noqa: N818  not an error: it ends a loop from within
    """The checkpoint that training resumed from is its last step."""


class AlreadyDone(TrainerCallback):
    """End a resumed training that has no step left; transformers would do one more."""

    def __init__(self, best: BestStep) -> None:
        """Take the early stopping of ``best`` into account."""
        self.best = best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the restored step with the last one.

        Raises:
            NothingLeftToTrain: If it is the last one.
        """
        if state.best_global_step and not state.best_model_checkpoint:
            # the stored path is wrong if the run folder was moved
            moved = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(moved) if moved.is_dir() else None
        if state.global_step and (
            state.global_step >= state.max_steps or self.best.has_waited(args, state)
        ):
            raise NothingLeftToTrain


class WholeParameters(TrainerCallback):
    """End a run with sharded parameters before its first step: they could not be saved."""

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Check the distributed model."""
        check_whole(model)


class SkippedSteps(TrainerCallback):
    """Restore the count of skipped steps from the checkpoint's history."""

    def __init__(self, watch: StepWatch) -> None:
        """Set the count of ``watch``."""
        self.watch = watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the history."""
        counts = [row["skipped_steps"] for row in state.log_history if "skipped_steps" in row]
        self.watch.skipped = counts[-1] if counts else 0


class CheckpointKeeper(TrainerCallback):
    """Delete old checkpoints, and nothing else beside them.

    Transformers takes every folder whose name starts with "checkpoint-" for its own, and would
    delete a copy that somebody made.
    """

    def __init__(self, limit: int | None) -> None:
        """Keep ``limit`` checkpoints, the best and the newest among them; None for all."""
        self.limit = limit

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delete the oldest ones."""
        if not args.should_save or not self.limit or self.limit < 1:
            return
        found = checkpoint_folders(Path(args.output_dir))
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
        protected = [one for one in found if one.name == best or one == found[-1]]
        others = [one for one in found if one not in protected]
        for folder in others[: max(0, len(found) - max(self.limit, len(protected)))]:
            shutil.rmtree(folder, ignore_errors=True)
