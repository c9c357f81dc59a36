"""Laws of SIGTERM: the step is finished and saved, and the same command goes on from it."""

import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from milora_vl.errors import StoppedError
from milora_vl.training.arguments import build_arguments
from milora_vl.training.stop import StopOnSigterm


def test_sigterm_saves_the_step_and_ends_the_training(tmp_path: Path) -> None:
    arguments = build_arguments({}, tmp_path, 0)
    state, control = TrainerState(global_step=3, max_steps=9), TrainerControl()
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSigterm()
    stop.on_train_begin(arguments, state, control)
    stop.on_step_end(arguments, state, control)
    assert not control.should_training_stop
    os.kill(os.getpid(), signal.SIGTERM)
    stop.on_step_end(arguments, state, control)
    assert control.should_save
    assert control.should_training_stop
    stop.on_train_end(arguments, state, control)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(StoppedError, match="step 3 is saved"):
        stop.check()


def test_a_signal_in_the_last_step_leaves_a_whole_run(tmp_path: Path) -> None:
    arguments = build_arguments({}, tmp_path, 0)
    state, control = TrainerState(global_step=9, max_steps=9), TrainerControl()
    stop = StopOnSigterm()
    stop.on_train_begin(arguments, state, control)
    os.kill(os.getpid(), signal.SIGTERM)
    stop.on_step_end(arguments, state, control)
    stop.on_train_end(arguments, state, control)
    stop.check()
