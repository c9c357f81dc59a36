"""SIGTERM ends a training with a checkpoint of its last step, as job schedulers ask for."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.errors import StoppedError
from milora_vl.runtime import ask_all, process_count

logger = logging.getLogger(__name__)


class StopOnSigterm(TrainerCallback):
    """Finishes the step, saves and stops; ``check`` then raises ``StoppedError``."""

    def __init__(self) -> None:
        """Start without a request to stop."""
        self._is_asked = False
        self._stopped_at: int | None = None
        self._answer: Callable[[], bool] | None = None
        self._before: Any = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        logger.warning("SIGTERM: this step is finished and saved, then the run stops")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen from now on; only the main thread of a process may."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if any process was asked: all must stop at the same step.

        Several processes learn of it one step later: they ask each other while the next step is
        computed, so that no step waits.
        """
        asked_before, self._answer = self._answer, ask_all(self._is_asked)
        answer = self._answer if process_count() == 1 else asked_before
        if answer is not None and answer():
            # no evaluation: the job is killed soon, and save_strategy best would undo the saving
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
            self._stopped_at = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the handler, and forget a stop at the last step."""
        self.give_back()
        if self._answer is not None:  # every process must finish the last exchange
            self._answer()
            self._answer = None
        if self._stopped_at == state.max_steps:  # it was the last step: the training is complete
            self._stopped_at = None

    def give_back(self) -> None:
        """Restore the earlier handler of SIGTERM, also after a training that failed."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def check(self) -> None:
        """Raise if the training was stopped.

        Raises:
            StoppedError: Naming the step that was saved.
        """
        if self._stopped_at is not None:
            raise StoppedError(f"stopped by SIGTERM; step {self._stopped_at} is saved")
