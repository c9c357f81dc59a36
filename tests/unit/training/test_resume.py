"""Laws of going on: a checkpoint is believed only if it is whole and of the same data and base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from milora_vl.training.resume import (
    ResumeError,
    check_finite_file,
    checkpoint_folders,
    choose_checkpoint,
    compare_facts,
    describe_base,
)


def check_weights(folder: Path) -> None:
    check_finite_file(folder / "weights.safetensors")


def make_checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "adapter").mkdir(parents=True)
    save_file({"A": torch.ones(40)}, made / "adapter" / "weights.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"value": torch.ones(40)}, made / name)
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return made


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "lost":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:  # a value that was changed on the disk
        middle = content.index(torch.ones(8).numpy().tobytes())
        file.write_bytes(content[:middle] + b"\1" + content[middle + 1 :])


@pytest.mark.parametrize("how", ["lost", "empty", "cut", "changed"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_is_not_whole_gives_way_to_an_older_one(tmp_path: Path, name: str, how: str) -> None:
    older, newer = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 10)
    assert choose_checkpoint(tmp_path, check_weights) == newer
    spoil(newer / name, how)
    assert choose_checkpoint(tmp_path, check_weights) == older
    spoil(older / name, how)
    with pytest.raises(ResumeError, match=rf"{name}.*resume_regardless"):
        choose_checkpoint(tmp_path, check_weights)
    assert choose_checkpoint(tmp_path, check_weights, regardless=True) == newer


def test_weights_that_are_not_finite_are_not_gone_on_from(tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
    bad = torch.tensor([1.0, float("nan")])
    save_file({"A": bad}, newer / "adapter" / "weights.safetensors")
    for regardless in (False, True):  # nothing can be gone on with there
        assert choose_checkpoint(tmp_path, check_weights, regardless=regardless) == older


def test_a_checkpoint_that_was_never_finished_is_no_fault(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, 2)
    (made / "trainer_state.json").write_text('{"global_st')
    assert choose_checkpoint(tmp_path, check_weights) is None


def test_names_beside_the_checkpoints_do_not_disturb(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, 4)
    for name in ("checkpoint-best", "checkpoint-4.bak", "checkpoint-99-copy", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-77").write_text("a file")
    assert checkpoint_folders(tmp_path) == [made]
    assert choose_checkpoint(tmp_path, check_weights) == made


def test_another_number_of_processes_is_told(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 4)
    with pytest.raises(ResumeError, match=r"rng_state_0\.pth is missing"):
        choose_checkpoint(tmp_path, check_weights, n_processes=2)


def test_a_named_checkpoint_serves_a_run_without_its_own(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path / "theirs", 4)
    own = tmp_path / "own"
    assert choose_checkpoint(own, check_weights, named=theirs) == theirs
    mine = make_checkpoint(own, 2)
    assert choose_checkpoint(own, check_weights, named=theirs) == mine


def test_other_data_or_another_base_is_refused(tmp_path: Path, make_tiny_vlm) -> None:
    file = tmp_path / "facts.json"
    facts = {"data": {"sha256": ["a", "b"]}, "base": describe_base(make_tiny_vlm())}
    compare_facts(file, facts, goes_on=False, regardless=False)
    compare_facts(file, facts, goes_on=True, regardless=False)
    for other in (
        facts | {"data": {"sha256": ["b", "a"]}},
        facts | {"base": describe_base(make_tiny_vlm(seed=1))},
    ):
        with pytest.raises(ResumeError, match="resume_regardless"):
            compare_facts(file, other, goes_on=True, regardless=False)
        compare_facts(file, other, goes_on=True, regardless=True)
