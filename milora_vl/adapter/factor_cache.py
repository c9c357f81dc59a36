"""SVD factors on disk, keyed by the values of the weight: no weight is decomposed twice."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from milora_vl.files import cache_folder, write_bytes_atomic

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the decomposition or the layout changes: older entries are not read
NESTED_SLICES: tuple[str, ...] = ("minor", "principal")  # a larger rank holds every smaller one

Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class FactorKey:
    """The key of an entry.

    Attributes:
        weight: Digest of the values, see ``fingerprint.digest_of``.
        shape: (d_out, d_in).
        slice: Part of the spectrum.
        svd: Requested method; different methods round differently.
    """

    weight: str
    shape: tuple[int, int]
    slice: str
    svd: str


@dataclass(frozen=True)
class FactorEntry:
    """The content of an entry.

    Attributes:
        triplets: U [d_out, r], S [r] descending, Vh [r, d_in]; float32 on the CPU.
        digests: Of the weight, see ``fingerprint.weight_digests``; None if they were not stored.
    """

    triplets: Triplets
    digests: dict[str, str] | None


def factors_folder() -> Path:
    """Return the folder of all entries, below ``cache_folder()``."""
    return cache_folder() / "factors"


class FactorCache:
    """A folder of entries; many processes may use it at once.

    An entry is one safetensors file that appears by renaming. With the slices ``minor`` and
    ``principal`` it holds the largest rank requested so far and serves every smaller one; the
    others hold one rank each. An entry that does not match its checksum is removed with a warning
    and counts as absent.

    Args:
        folder: Made on first use.
    """

    def __init__(self, folder: Path) -> None:
        """Point at the folder."""
        self.folder = folder
        self._writable = True

    def get(self, key: FactorKey, r: int) -> FactorEntry | None:
        """Return the entry for a weight at rank r, or None."""
        file = self._file(key, r)
        try:
            tensors = load(file.read_bytes())  # once: the file may be replaced meanwhile
            if tensors.pop("checksum").numpy().tobytes() != _checksum(tensors):
                raise ValueError("its checksum does not match")
        except OSError:  # absent, or not readable by this user
            return None
        except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
            logger.warning("factor cache: dropped the damaged entry %s (%s)", file.name, error)
            with suppress(OSError):  # the folder may be read-only
                file.unlink()
            return None
        U, S, Vh = tensors["U"], tensors["S"], tensors["Vh"]
        stored = S.numel()
        if stored < r:
            return None
        if stored > r:
            part = slice(0, r) if key.slice == "principal" else slice(stored - r, stored)
            U, S, Vh = U[:, part].contiguous(), S[part].contiguous(), Vh[part].contiguous()
        facts = json.loads(tensors["facts"].numpy().tobytes())
        return FactorEntry((U, S, Vh), facts.get("digests"))

    def put(
        self, key: FactorKey, triplets: Triplets, digests: Mapping[str, str] | None = None
    ) -> None:
        """Store triplets and the digests of the weight; an entry of the same key is replaced.

        A full or read-only disk costs one warning.
        """
        if not self._writable:
            return
        tensors = dict(zip(("U", "S", "Vh"), (x.cpu().contiguous() for x in triplets), strict=True))
        facts = {"digests": dict(digests)} if digests else {}
        tensors["facts"] = _bytes_tensor(json.dumps(facts).encode())
        tensors["checksum"] = _bytes_tensor(_checksum(tensors))
        metadata = {"slice": key.slice, "svd": key.svd}  # for people
        try:
            write_bytes_atomic(
                self._file(key, triplets[1].numel()), save(tensors, metadata), durable=False
            )
        except OSError as error:
            self._writable = False
            logger.warning("factor cache: %s cannot be written (%s)", self.folder, error)

    def entries(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield file, and rank, shape, slice and size in bytes, of every readable entry."""
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    metadata = opened.metadata()
                    r, d_in = opened.get_slice("Vh").get_shape()
                    d_out = opened.get_slice("U").get_shape()[0]
                size = file.stat().st_size
            except (SafetensorError, OSError, RuntimeError):  # damaged, or just removed
                continue
            facts = {"rank": r, "shape": (d_out, d_in), "slice": metadata["slice"]}
            yield file, {**facts, "bytes": size}

    def clear(self) -> int:
        """Remove every entry, also damaged and half-written ones; return how many bytes."""
        freed = 0
        for file in [*self.folder.glob("*.safetensors"), *self.folder.glob(".*.safetensors.*")]:
            with suppress(FileNotFoundError):  # another process was faster
                size = file.stat().st_size
                file.unlink()
                freed += size
        return freed

    def _file(self, key: FactorKey, r: int) -> Path:
        rank = None if key.slice in NESTED_SLICES else r
        facts = [FORMAT, key.weight, list(key.shape), key.slice, key.svd, rank]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]
        return self.folder / f"{name}.safetensors"


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _checksum(tensors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name in ("U", "S", "Vh", "facts"):
        tensor = tensors[name]
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(memoryview(tensor.numpy()).cast("B"))
    return digest.digest()
