"""SVD factors on disk, keyed by the values of the weight: decomposed once, read ever after."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from milora_vl.files import cache_folder, write_bytes_atomic

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the decomposition or the layout changes: older entries are not read
NESTED_SLICES: tuple[str, ...] = ("minor", "principal")  # a larger rank holds every smaller one

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class FactorKey:
    """What an entry is found by.

    Attributes:
        weight: SHA-256 of the float32 values of the weight.
        shape: (d_out, d_in).
        slice: Part of the spectrum.
        svd: Method asked for; different methods round differently.
    """

    weight: str
    shape: tuple[int, int]
    slice: str
    svd: str


@dataclass(frozen=True)
class FactorEntry:
    """What an entry holds.

    Attributes:
        triplets: U [d_out, r], S [r] descending, Vh [r, d_in]; float32 on the CPU.
        stored_rank: Rank that was decomposed. Where it is larger than r, the triplets are its
            slice.
        facts: Plain values that were stored with it, true of the same weight.
    """

    triplets: Triplets
    stored_rank: int
    facts: dict[str, Any]


def factors_folder() -> Path:
    """Return the folder of all entries, below ``cache_folder()``."""
    return cache_folder() / "factors"


class FactorCache:
    """A folder of entries; many processes may use it at once.

    An entry is one safetensors file that appears by renaming. With the slices ``minor`` and
    ``principal`` it holds the largest rank asked for so far and serves every smaller one; the
    others hold one rank each. An entry that does not match its own checksum is removed, with a
    line in the log, and counts as absent.

    Args:
        folder: Made on first use.
    """

    def __init__(self, folder: Path) -> None:
        """Point at the folder."""
        self.folder = folder

    def get(self, key: FactorKey, r: int) -> FactorEntry | None:
        """Return the entry for a weight at rank r, or None."""
        file = self._file(key, r)
        try:
            tensors, metadata = _read(file)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("factor cache: dropped the damaged entry %s (%s)", file.name, error)
            file.unlink(missing_ok=True)
            return None
        U, S, Vh = tensors["U"], tensors["S"], tensors["Vh"]
        stored = S.numel()
        if stored < r:
            return None
        if stored > r:
            part = slice(0, r) if key.slice == "principal" else slice(stored - r, stored)
            U, S, Vh = U[:, part].contiguous(), S[part].contiguous(), Vh[part].contiguous()
        return FactorEntry((U, S, Vh), stored, json.loads(metadata["facts"]))

    def put(self, key: FactorKey, triplets: Triplets, facts: Mapping[str, Any]) -> None:
        """Store triplets and plain values; what the key held before is replaced.

        Ask ``get`` first. A full or read-only disk costs a line in the log, nothing else.
        """
        r = triplets[1].numel()
        tensors = dict(zip(("U", "S", "Vh"), (x.cpu().contiguous() for x in triplets), strict=True))
        metadata = {
            "facts": json.dumps(dict(facts)),
            "checksum": _checksum(tensors, facts),
            "slice": key.slice,
            "svd": key.svd,
        }
        try:
            write_bytes_atomic(self._file(key, r), save(tensors, metadata), durable=False)
        except OSError as error:
            logger.warning("factor cache: %s cannot be written (%s)", self.folder, error)

    def entries(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield file, and rank, shape, slice and size in bytes, of every readable entry."""
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    metadata = opened.metadata()
                    r, d_in = opened.get_slice("Vh").get_shape()
                    d_out = opened.get_slice("U").get_shape()[0]
            except (SafetensorError, OSError):
                continue
            facts = {"rank": r, "shape": (d_out, d_in), "slice": metadata["slice"]}
            yield file, {**facts, "bytes": file.stat().st_size}

    def clear(self) -> int:
        """Remove every entry, also damaged and half-written ones; return how many bytes."""
        freed = 0
        for file in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.safetensors.*")]:
            freed += file.stat().st_size
            file.unlink(missing_ok=True)
        return freed

    def _file(self, key: FactorKey, r: int) -> Path:
        rank = None if key.slice in NESTED_SLICES else r
        facts = [FORMAT, key.weight, list(key.shape), key.slice, key.svd, rank]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]
        return self.folder / f"{name}.safetensors"


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in ("U", "S", "Vh")}
    if metadata["checksum"] != _checksum(tensors, json.loads(metadata["facts"])):
        raise ValueError("its checksum does not match")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name in ("U", "S", "Vh"):
        tensor = tensors[name]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()
