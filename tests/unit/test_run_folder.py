"""Laws of the run folder: one set of settings, one command at a time."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milora_vl.config import Config, ConfigError, load_config, parse_config
from milora_vl.run_folder import RunBusyError, claim_run_folder, locked


def config_with(**overrides: dict) -> Config:
    values = {
        "model": {"path": "x", "prompt_style": "chatml"},
        "data": {"train": "x", "image_folder": "here"},
        "training": {"max_steps": 4, "learning_rate": 1e-3},
    }
    for section, keys in overrides.items():
        values[section] = values.get(section, {}) | keys
    return parse_config(values)


@pytest.fixture
def begun_run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    claim_run_folder(config_with(), folder)
    (folder / "checkpoints").mkdir()  # as once training has begun
    return folder


def test_what_changes_the_result_is_refused_with_key_and_both_values(begun_run: Path) -> None:
    other = config_with(adapter={"r": 2}, training={"max_steps": 4, "learning_rate": 1e-4})
    with pytest.raises(ConfigError) as refused:
        claim_run_folder(other, begun_run)
    assert "adapter.r was 128, now 2" in str(refused.value)
    assert "training.learning_rate was 0.001, now 0.0001" in str(refused.value)
    assert "max_steps" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("data", {"on_bad_image": "skip"}),
        ("data", {"on_bad_record": "skip"}),
        ("training", {"logging_steps": 7, "report_to": "tensorboard"}),
        ("training", {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}),
        ("training", {"dataloader_num_workers": 2}),
        ("model", {"device": "cpu"}),
    ],
)
def test_a_run_goes_on_with_other_logging_saving_workers_or_care(
    begun_run: Path, section: str, keys: dict
) -> None:
    other = config_with(**{section: keys})
    claim_run_folder(other, begun_run)
    assert load_config(begun_run / "config.yaml") == other  # the folder says what is so now


def test_a_start_that_failed_before_any_work_leaves_the_folder_free(tmp_path: Path) -> None:
    claim_run_folder(config_with(model={"path": "mispelt"}), tmp_path / "run")
    written = ("environment.json", "timing.json", "training_data.json", "certificate.json")
    for name in written:  # a record that does not fit is found after all of these
        (tmp_path / "run" / name).write_text("{}", encoding="utf-8")
    claim_run_folder(config_with(), tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml") == config_with()
    assert not any((tmp_path / "run" / name).exists() for name in written)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        claim_run_folder(config_with(), tmp_path)


def claim_together(barrier, folder: Path, answers) -> None:
    barrier.wait()
    try:
        claim_run_folder(config_with(), folder)
        answers.put("")
    except Exception as error:
        answers.put(str(error))


def test_processes_that_start_at_once_never_refuse_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(5):
        barrier, answers = context.Barrier(8), context.Queue()
        arguments = (barrier, tmp_path / str(number), answers)
        processes = [context.Process(target=claim_together, args=arguments) for _ in range(8)]
        for process in processes:
            process.start()
        assert [answers.get(timeout=60) for _ in processes] == [""] * 8
        for process in processes:
            process.join()


HOLD = """
import sys, time
from pathlib import Path
from milora_vl.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_command_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        year = time.strftime("%Y")
        with pytest.raises(RunBusyError, match=rf"process {holder.pid} .*started {year}-"):
            locked(tmp_path).__enter__()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        assert not list(tmp_path.glob("[!.]*"))
