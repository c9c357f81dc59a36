"""Which checkpoint a stopped training resumes from: a complete one, of the same data and base.

A checkpoint is complete if all its files exist and can be read to their end. ``trainer_state.json``
is written last, so a folder without it was never finished and is ignored. If a finished checkpoint
has been damaged since, an older complete one is used with a warning, or the run stops.
"""

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from milora_vl.errors import MiloraError
from milora_vl.files import write_json_atomic
from milora_vl.runtime import is_main_process, wait_for_all
from milora_vl.training.watch import all_finite

logger = logging.getLogger(__name__)

REGARDLESS = "training.resume_regardless=true"
SAMPLED_VALUES = 64
FACTS_FILE = "training_data.json"


class ResumeError(MiloraError, ValueError):
    """A training cannot resume from the content of its folder."""


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints that training wrote, oldest first; other folders are ignored."""
    named = [
        one for one in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", one.name)
    ]
    return sorted((one for one in named if one.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def is_finished(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and isinstance(state.get("global_step"), int)


def find_problems(
    checkpoint: Path, check_weights: Callable[[Path], None], n_processes: int = 1
) -> list[str]:
    """Return what is missing or damaged in a finished checkpoint.

    Args:
        checkpoint: The folder.
        check_weights: Raises ``OSError`` or ``ValueError`` unless the folder ``adapter`` is
            complete.
        n_processes: Processes of this training, each with its own random state.
    """
    found = []
    try:
        check_weights(checkpoint / "adapter")
    except (OSError, ValueError) as error:
        found.append(f"adapter: {error}")
    names = ["optimizer.pt", "scheduler.pt"]
    if n_processes == 1:
        names.append("rng_state.pth")
    else:
        names += [f"rng_state_{rank}.pth" for rank in range(n_processes)]
    for name in names:
        if problem := archive_problem(checkpoint / name):
            found.append(f"{name} {problem}")
    return found


def archive_problem(file: Path) -> str | None:
    """Return what is wrong with a file of ``torch.save``, or None; checksums are verified."""
    if not file.exists():
        return "is missing"
    if file.stat().st_size == 0:
        return "is empty"
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        return "is cut short"
    return f"is damaged ({damaged})" if damaged else None


def check_finite_file(file: Path) -> None:
    """Check that the tensors of a safetensors file can be read and are finite.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged or holds NaN or infinity.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is missing")
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            for key in stored.keys():  # noqa: SIM118
                if not all_finite([stored.get_tensor(key)]):
                    raise ValueError(f"{file.name}: {key} holds NaN or infinity")
    except SafetensorError as error:
        raise ValueError(f"{file.name} is damaged: {error}") from error


def choose_checkpoint(
    folder: Path,
    check_weights: Callable[[Path], None],
    *,
    n_processes: int = 1,
    named: str | Path | None = None,
    regardless: bool = False,
) -> Path | None:
    """Return the checkpoint to resume from, or None to start.

    Args:
        folder: Holds the run's own checkpoints.
        check_weights: See ``find_problems``.
        n_processes: See ``find_problems``.
        named: A checkpoint of another run, used if this run has none.
        regardless: Use the newest one whose weights can be read, whatever else it lacks.

    Raises:
        ResumeError: If there are finished checkpoints and none is complete; the message says what
            the newest lacks and what can be done.
    """
    own = [one for one in checkpoint_folders(folder) if is_finished(one)]
    if not own and named:
        own = [Path(named).expanduser()]
        if not is_finished(own[0]):
            raise ResumeError(f"{named} is no finished checkpoint: it has no trainer_state.json")
    problems: dict[Path, list[str]] = {}
    for checkpoint in reversed(own):
        found = find_problems(checkpoint, check_weights, n_processes)
        # the weights come first in the list, and nothing replaces them
        if not found or (regardless and not found[0].startswith("adapter: ")):
            if found:
                logger.warning("%s: resuming without: %s", checkpoint, "; ".join(found))
            return checkpoint
        logger.warning("%s is not complete: %s", checkpoint, "; ".join(found))
        problems[checkpoint] = found
    if not problems:
        return None
    newest, found = next(iter(problems.items()))
    raise ResumeError(
        f"{newest}: {'; '.join(found)}; no older checkpoint is complete. {REGARDLESS} resumes "
        "from the newest weights that can be read, with a new optimizer; to start over, remove "
        f"{folder}"
    )


def describe_data(datasets: Iterable[Any]) -> dict[str, Any]:
    """Return what identifies the samples: their number, and a digest of their texts in order.

    Skipped records and the images' bytes are not part of it.

    Args:
        datasets: With ``conversations``, or mixtures of such.
    """
    digest, count = hashlib.sha256(), 0
    for dataset in datasets:
        parts = getattr(dataset, "datasets", [dataset])
        for part in parts:
            for one in getattr(part, "conversations", ()):
                facts = [[turn.role, turn.text] for turn in one.turns]
                digest.update(json.dumps([facts, list(one.images)]).encode())
                count += 1
        digest.update(json.dumps(getattr(dataset, "places", None)).encode())
    return {"records": count, "sha256": digest.hexdigest()}


def describe_base(model: nn.Module) -> str:
    """Return a digest of a base model: names, shapes and some values of every tensor.

    It is quick and tells checkpoints apart; the adapted layers also have a full fingerprint.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        # packed 4-bit weights change their layout on a CPU
        if value.is_floating_point() and value.numel():
            step = max(1, value.numel() // SAMPLED_VALUES)  # spread over the whole tensor
            picked = value.detach().reshape(-1)[::step][:SAMPLED_VALUES]
            digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def compare_facts(file: Path, facts: dict[str, Any], goes_on: bool, regardless: bool) -> None:
    """Write what a training starts with, or compare it when the training is resumed.

    Runs of earlier versions have no such file; nothing is compared then.

    Raises:
        ResumeError: Naming what differs, unless ``regardless``.
    """
    if not goes_on:
        if is_main_process():
            write_json_atomic(file, facts)
        wait_for_all()
        return
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    differing = [key for key in before if key in facts and before[key] != facts[key]]
    if not differing:
        return
    told = "; ".join(f"{key}: {before[key]} before, {facts[key]} now" for key in differing)
    if not regardless:
        raise ResumeError(
            f"{file}: the training started with something else ({told}). Give another run "
            f"folder, restore the old files, or resume anyway with {REGARDLESS}"
        )
    logger.warning("%s: resuming although the training started with something else: %s", file, told)
