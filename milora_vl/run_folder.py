"""A run folder belongs to one set of settings and to one command at a time."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from milora_vl.config import Config, ConfigError, dump_config, load_config
from milora_vl.errors import MiloraError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
STARTED_BY = (
    "config.yaml",
    "environment.json",
    "timing.json",
    "training_data.json",
    "certificate.json",
)
"""Files written before any work: with only these, all settings may still change."""

FREE_SETTINGS = (
    "run_folder",
    "data.prepare",
    "model.prepare",
    "data.on_bad_image",
    "data.on_bad_record",
    "model.device",
    "model.trust_remote_code",
    "model.allow_pickle",
    "adapter.factor_cache",
    "eval.batch_size",
    *(
        f"{section}.{key}"
        for section in ("training", "alignment.training")
        for key in (
            *("logging_*", "log_*", "report_to", "run_name", "disable_tqdm", "project"),
            *(
                "on_non_finite",
                "resume_regardless",
                "save_*",
                "hub_*",
                "push_to_hub",
                "enable_jit_checkpoint",
                "include_*",
            ),
            *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
            *("dataloader_persistent_workers", "ddp_timeout", "skip_memory_metrics"),
        )
    ),
)
"""Settings that may change when a run is resumed: logging, saving, loading of data, and how bad
records are handled. All others decide what is learned or how it is scored."""

SHOWN_DIFFERENCES = 8


class RunBusyError(MiloraError, RuntimeError):
    """Another command works in the run folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of a run folder while the block runs.

    It is a lock of the system on an open file, which ends with the process.

    Raises:
        RunBusyError: If another command holds it; the message names its process and its start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as stream:
        _lock(stream, folder)
        stream.truncate(0)  # only now: before, the text was another process's
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        stream.flush()
        yield


def _lock(stream: IO[str], folder: Path) -> None:
    try:
        if os.name == "nt":
            import msvcrt

            # far beyond the text, which other processes must be able to read
            os.lseek(stream.fileno(), 1 << 20, os.SEEK_SET)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # not flock: a worker process that outlives a killed parent would inherit it
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            logger.warning("%s: cannot be locked here (%s); start one command alone", folder, error)
            return
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        raise RunBusyError(
            f"{folder} is in use by {holder}; wait for it, or give another folder with --run-folder"
        ) from None


def claim_run_folder(config: Config, folder: Path) -> None:
    """Make the run folder, or check that the existing one has the same settings.

    Settings that do not change the result may differ; before any work, all may.

    Raises:
        ConfigError: If it holds a run with other settings; each is named with both values.
    """
    file = folder / "config.yaml"
    # names with a dot: the lock, and files that another process is writing
    kept = [one.name for one in folder.iterdir()] if folder.exists() else []
    kept = [name for name in kept if not name.startswith(".")]
    if file.exists():
        differing = differing_settings(
            load_config(file).model_dump(mode="json"), config.model_dump(mode="json")
        )
        fixed = {
            key: both
            for key, both in differing.items()
            if not any(fnmatchcase(key, pattern) for pattern in FREE_SETTINGS)
        }
        if fixed and set(kept) - set(STARTED_BY):
            raise ConfigError(
                f"{folder} holds a run with other settings: {_describe(fixed)}. Give another "
                "folder with --run-folder, or remove it"
            )
        if differing:
            logger.info("%s: settings changed: %s", folder, _describe(differing))
        if fixed:  # what a start wrote that ended before its first step, for the old settings
            for name in STARTED_BY:
                (folder / name).unlink(missing_ok=True)
        if not differing:
            return
    elif set(kept) - set(STARTED_BY):
        raise ConfigError(
            f"{folder} is not empty and holds no run; give another folder with --run-folder"
        )
    dump_config(config, file)


def differing_settings(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return {"section.key": (value before, value now)} of all settings that differ."""
    old, new = _flat(before), _flat(now)
    keys = list(dict.fromkeys([*old, *new]))
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        elif value != {}:
            found[f"{prefix}{key}"] = value
    return found


def _describe(differing: Mapping[str, tuple[Any, Any]]) -> str:
    shown = list(differing.items())[:SHOWN_DIFFERENCES]
    texts = [f"{key} was {_value(old)}, now {_value(new)}" for key, (old, new) in shown]
    more = len(differing) - len(shown)
    return "; ".join(texts) + (f"; and {more} more" if more else "")


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
