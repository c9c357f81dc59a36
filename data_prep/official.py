"""Public sets in their official layout: check them, write what can be used, say what cannot.

A set's own module reads its files and yields records; here every record is validated, its image is
found and looked at, and the usable records, those that are left out and a manifest are written.
Images are never copied or changed: records name them relative to the raw folder, which is then
``data.image_folder``.
"""

import argparse
import json
import logging
import os
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from milora_vl.data.images import BadImageError, ImagePathError, load_image, read_image_size
from milora_vl.data.images import resolve_image as find_path
from milora_vl.data.records import RecordError, parse_record
from milora_vl.errors import MiloraError
from milora_vl.files import sha256_of, write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_BLOCK = 1 << 20
_HUB = "hf://datasets/"
_TRIES = 5

Sample = tuple[str, dict[str, Any]]
"""The part of the set that a record belongs to, and the record."""


class OfficialSetError(MiloraError, ValueError):
    """A set whose files are missing, are not in the official layout or cannot be downloaded."""


@dataclass(frozen=True)
class Remote:
    """A file at its official place.

    Attributes:
        url: Where it is; ``hf://datasets/OWNER/NAME/FILE`` is a file of a data set on the hub.
        path: Where it belongs below the raw folder.
        size: Bytes, if published.
        sha256: Digest, if published.
    """

    url: str
    path: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class OfficialSet:
    """One set.

    Attributes:
        name: As in file names and the manifest.
        read: Raw folder -> samples, in the order in which they are written.
        published: Records of each part as its authors or users count them.
        remotes: What ``--download`` fetches; archives are left packed.
        note: What a user should know, for ``--help`` and the manifest.
    """

    name: str
    read: Callable[[Path], Iterable[Sample]]
    published: Mapping[str, int]
    remotes: Sequence[Remote] = ()
    note: str = ""


@dataclass
class _Tally:
    """What was found while a set was read."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    renamed: int = 0


def build(official: OfficialSet, raw: Path, out: Path, *, decode: bool = False) -> dict[str, Any]:
    """Write ``train.json``, ``left_out.jsonl`` and ``manifest.json`` into a folder.

    Args:
        official: The set.
        raw: Folder with its files in the official layout.
        out: Folder to write; files of an earlier build are replaced one by one.
        decode: Decode every image, not only its header: finds files that were cut short.

    Returns:
        The manifest.

    Raises:
        OfficialSetError: If a file of the set is missing or malformed, or no record can be used.
    """
    if not raw.is_dir():
        raise OfficialSetError(f"{raw}: no such folder; --raw is the one with the official files")
    try:
        samples = list(official.read(raw))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, OfficialSetError):
            raise
        raise OfficialSetError(
            f"{raw}: not in the official layout of {official.name}: {type(error).__name__}: {error}"
        ) from error
    images = _look_at_images(raw, [record for _, record in samples], decode)
    tally = _Tally()
    kept, left_out = [], []
    for number, (part, record) in enumerate(samples):
        tally.read[part] += 1
        reason, detail = _check(record, f"{official.name}[{number}]", images)
        if reason is None:
            tally.renamed += _use_found_name(record, images)
            kept.append(json.dumps(record, ensure_ascii=False))
            tally.written[part] += 1
        else:
            line = {"record": number, "id": record.get("id"), "part": part}
            line |= {"reason": reason, "detail": detail}
            left_out.append(json.dumps(line, ensure_ascii=False) + "\n")
            tally.left_out[reason] += 1
    if not kept:
        raise OfficialSetError(
            f"{raw}: no record of {official.name} can be used; left out: {dict(tally.left_out)}"
        )
    # a record a line: they can be told apart in a pager, and it is plain JSON
    write_text_atomic(out / "train.json", "[\n" + ",\n".join(kept) + "\n]\n")
    write_text_atomic(out / "left_out.jsonl", "".join(left_out))
    manifest = {
        "name": official.name,
        "records": tally.written.total(),
        "parts": {
            part: {
                "read": tally.read[part],
                "published": official.published.get(part),
                "written": tally.written[part],
            }
            for part in sorted({*tally.read, *official.published})
        },
        "left_out": dict(tally.left_out),
        "found_under_another_suffix": tally.renamed,
        "image_folder": str(raw.resolve()),
        "images_decoded": decode,
        "note": official.note,
    }
    write_json_atomic(out / "manifest.json", manifest)
    return manifest


def describe(manifest: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what was written, what was left out and what differs."""
    lines = [f"{manifest['name']}: {manifest['records']} records written"]
    for part, count in manifest["parts"].items():
        published = count["published"]
        remark = "" if published is None else f", published {published}"
        if published not in (None, count["read"]):
            remark += f" (difference {count['read'] - published:+})"
        lines.append(f"  {part}: {count['read']} read{remark}, {count['written']} written")
    lines += [f"  left out, {reason}: {n}" for reason, n in manifest["left_out"].items()]
    if manifest["found_under_another_suffix"]:
        lines.append(f"  found under another suffix: {manifest['found_under_another_suffix']}")
    lines.append(f"  data.image_folder: {manifest['image_folder']}")
    return lines


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OfficialSetError: If it is missing or malformed; the file is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OfficialSetError(f"{path}: missing; see --help for the layout") from error
    except (OSError, ValueError, RecursionError) as error:
        raise OfficialSetError(f"{path}: cannot be read as JSON: {error}") from error


def find_first(raw: Path, *names: str) -> Path:
    """Return the first of several paths below a folder that exists, else the first of them."""
    return next((raw / name for name in names if (raw / name).exists()), raw / names[0])


def exchanges(pairs: Iterable[tuple[str, str]], has_image: bool = True) -> list[dict[str, str]]:
    """Return LLaVA's turns of questions and answers about one image."""
    turns = []
    for question, answer in pairs:
        mark = "<image>\n" if has_image and not turns else ""
        turns += [
            {"from": "human", "value": f"{mark}{question}"},
            {"from": "gpt", "value": answer},
        ]
    return turns


def commonest(answers: Iterable[str]) -> str:
    """Return the answer that most people gave; the first of them where several are as common."""
    return Counter(answer.strip() for answer in answers).most_common(1)[0][0]


def _look_at_images(
    raw: Path, records: Sequence[Mapping[str, Any]], decode: bool
) -> dict[str, tuple[str | None, str]]:
    """Return for each image name the name under which it is found, or None and the reason."""
    names = list(dict.fromkeys(r["image"] for r in records if isinstance(r.get("image"), str)))

    def look(name: str) -> tuple[str | None, str]:
        return _look_at_image(raw, name, decode)

    # reading headers waits for the disk, decoding releases the interpreter
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        found = tqdm(pool.map(look, names, chunksize=64), "images", len(names), unit="image")
        return dict(zip(names, found, strict=True))


def _look_at_image(raw: Path, name: str, decode: bool) -> tuple[str | None, str]:
    try:
        path = find_path(raw, name)
    except ImagePathError as error:
        return None, str(error)
    # OCR-VQA names .jpg for files that its servers give as .gif
    candidates = [path, *(path.with_suffix(suffix) for suffix in _SUFFIXES)]
    there = next((one for one in candidates if one.is_file()), None)
    if there is None:
        return None, f"{path}: missing"
    try:
        (load_image if decode else read_image_size)(there)
    except BadImageError as error:
        return None, str(error)
    return str(Path(name).with_suffix(there.suffix)) if there != path else name, ""


def _check(
    record: Mapping[str, Any], where: str, images: Mapping[str, tuple[str | None, str]]
) -> tuple[str | None, str]:
    try:
        parse_record(record, where)
    except RecordError as error:
        return error.reason, str(error)
    name = record.get("image")
    if name is None:
        return None, ""
    found, detail = images[name]
    return ("image missing or unreadable", detail) if found is None else (None, "")


def _use_found_name(record: dict[str, Any], images: Mapping[str, tuple[str | None, str]]) -> bool:
    name = record.get("image")
    found = name if name is None else images[name][0]
    record |= {} if name is None else {"image": found}
    return found != name


def download(remote: Remote, raw: Path) -> Path:
    """Fetch one file; an interrupted download goes on where it stopped.

    Args:
        remote: The file.
        raw: Folder it belongs below.

    Returns:
        Its path; a file already there is kept if size and digest agree.

    Raises:
        OfficialSetError: If it cannot be had, or its size or digest is not the published one.
    """
    path = raw / remote.path
    if not path.is_file() and remote.url.startswith(_HUB):
        _from_hub(remote, path)
    elif not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part")
        for attempt in range(_TRIES):
            try:
                _go_on(remote, partial)
                break
            except OSError as error:  # URLError, a time-out, a connection that was cut
                if attempt + 1 == _TRIES or getattr(error, "code", 500) < 500:
                    raise OfficialSetError(
                        f"{remote.url}: cannot be downloaded: {error}; what has come is kept in "
                        f"{partial}, and the same command goes on from there"
                    ) from error
                time.sleep(2**attempt)
        partial.replace(path)
    size = path.stat().st_size
    if remote.size not in (None, size):
        raise OfficialSetError(f"{path}: {size} bytes, published {remote.size}; remove it")
    if remote.sha256 is not None and sha256_of(path) != remote.sha256:
        raise OfficialSetError(f"{path}: its SHA-256 is not the published one; remove it")
    return path


def _from_hub(remote: Remote, path: Path) -> None:
    owner, name, file = remote.url.removeprefix(_HUB).split("/", 2)
    try:
        found = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", local_dir=path.parent)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise OfficialSetError(f"{remote.url}: cannot be downloaded: {error}") from error
    Path(found).replace(path)


def _go_on(remote: Remote, partial: Path) -> None:
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send
            return
        raise
    with response, partial.open("ab" if response.status == 206 else "wb") as stream:
        start = have if response.status == 206 else 0
        total = start + int(response.headers["Content-Length"] or 0) or None
        bar = tqdm(total=total, initial=start, desc=partial.stem, unit="B", unit_scale=True)
        with bar:
            while block := response.read(_BLOCK):
                stream.write(block)
                bar.update(len(block))
        if total is not None and bar.n < total:
            raise OSError(f"the connection ended after {bar.n} of {total} bytes")


def run(official: OfficialSet, layout: str, arguments: Sequence[str] | None = None) -> int:
    """Run a set's command line; returns the exit code: 0, or 1 if nothing could be written."""
    text = f"{layout.strip()}\n\n{official.note}".strip()
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", type=Path, required=True, help="folder in the official layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for records and manifest")
    parser.add_argument("--decode", action="store_true", help="decode every image (slow)")
    if official.remotes:
        help_text = "first fetch the files from their official places; archives stay packed"
        parser.add_argument("--download", action="store_true", help=help_text)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if getattr(options, "download", False):
            for remote in official.remotes:
                download(remote, options.raw)
        manifest = build(official, options.raw, options.out, decode=options.decode)
    except (OfficialSetError, OSError) as error:
        logger.error("%s was not built: %s", official.name, error)
        return 1
    for line in describe(manifest):
        logger.info("%s", line)
    return 0


def records_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a LLaVA file.

    Raises:
        OfficialSetError: If it holds no list of objects.
    """
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise OfficialSetError(f"{path}: a list of records was expected")
    yield from content
