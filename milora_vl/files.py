"""Files that are whole or absent: temporary name first, then one rename."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return the folder of downloads and derived files: ``$MILORA_CACHE`` or in ``~/.cache``."""
    return Path(os.environ.get("MILORA_CACHE") or Path.home() / ".cache" / "milora_vl").expanduser()


def write_bytes_atomic(path: Path | str, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new.

    Args:
        path: The file; its folder is made.
        data: The content.
        durable: Wait until the disk has it. Without, a power cut may leave a damaged file, so only
            for files that carry a checksum.

    Raises:
        OSError: If the folder cannot be written or the disk is full; ``path`` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, because a rename is atomic only within one file system
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8; see ``write_bytes_atomic``."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON; see ``write_text_atomic``."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder into its place; a folder already there is removed after the swap."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # a full folder cannot be renamed over, so it is moved aside first
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
        final.replace(old / final.name)
        try:
            temporary.replace(final)
        except BaseException:
            (old / final.name).replace(final)
            old.rmdir()
            raise
        shutil.rmtree(old)
    else:
        temporary.replace(final)


def check_new_folder(folder: Path | str) -> Path:
    """Return the absolute path of a folder to be written, if nothing would be overwritten.

    Raises:
        FileExistsError: If it is a file, or a folder that holds something.
    """
    folder = Path(folder).resolve()
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists already and nothing in it is overwritten; remove it, or name another"
        )
    return folder


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
