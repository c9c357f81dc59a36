"""The weights of a checkpoint on disk, read one at a time by their names in the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from milora_vl.model.hub import fetch_folder

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class ShardedWeights:
    """The float weights of a safetensors checkpoint by full parameter name, read when asked for.

    Names in the file may be those of older transformers versions
    (``language_model.model.layers...``): they are mapped as transformers maps them at loading.
    Files are read, not memory-mapped, so that they do not stay resident.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Open the shards in ``folder`` under the parameter names of ``model``.

        Args:
            folder: Holds ``model.safetensors``, or shards with their index.
            model: Gives names and mapping; it may be on the meta device.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is no safetensors file.
        """
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._places = {
            name: (file, key)
            for (key, file), name in _named(model, list_keys(folder, self._open))
            if name is not None
        }

    def __contains__(self, name: object) -> bool:
        """Tell whether a parameter of that full name is in the checkpoint."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Yield the full names, in the order of the checkpoint."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._places)

    def read(self, name: str) -> Tensor:
        """Return one parameter in the dtype of the file, on the CPU.

        Args:
            name: Full parameter name in the model, for example ``lm_head.weight``.

        Raises:
            KeyError: If the checkpoint has no such parameter.
            ValueError: If the file is damaged.
        """
        if name not in self._places:
            raise KeyError(
                f"{name} is not stored as a tensor of its own in {self.folder}: checkpoints that "
                "fuse or split layers are not supported here; save the model once with "
                "save_pretrained of this transformers version in float"
            )
        file, key = self._places[name]
        try:
            return self._open(file).get_slice(key)[...]
        except SafetensorError as error:
            raise ValueError(f"{self.folder / file}: {key} cannot be read: {error}") from error

    def weight_of(self, module: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Return the weight [d_out, d_in] of a linear layer by its full name, on the CPU.

        Args:
            module: Full name of the layer.
            dtype: Of the result; None keeps that of the file.

        Raises:
            KeyError: If the checkpoint has no such weight.
            ValueError: If the file is damaged or the weight is stored quantized.
        """
        weight = self.read(f"{module}.weight")
        if not weight.is_floating_point():
            raise ValueError(f"{self.folder}: {module} is stored as {weight.dtype}, not as float")
        return weight if dtype is None else weight.to(dtype)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing; copy the checkpoint again")
            try:
                # pages of a mapped file would count as memory of this process
                self._files[file] = safe_open(path, framework="pt", backend="pread")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}; copy it again") from error
        return self._files[file]


def checkpoint_folder(path: str, revision: str | None = None, *, only_here: bool = False) -> Path:
    """Return the folder of a checkpoint, fetched from the hub if ``path`` is no folder here.

    Args:
        path: Folder or hub id.
        revision: Of the hub.
        only_here: Take what an earlier download left, and fetch nothing.

    Raises:
        milora_vl.model.load_errors.LoadError: If it cannot be fetched.
        OSError: If it is not here, with ``only_here``.
    """
    wanted = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
    if only_here and not Path(path).is_dir():
        return Path(
            snapshot_download(path, revision=revision, allow_patterns=wanted, local_files_only=True)
        )
    return fetch_folder(path, wanted, revision=revision)


def list_keys(folder: Path, opened: Any) -> list[tuple[str, str]]:
    """Return (tensor key, file name) of every tensor, from the index or from the single file.

    Raises:
        FileNotFoundError: If the folder holds neither.
        ValueError: If the index is damaged or names another place.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise FileNotFoundError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; reading layer by layer "
                "needs a safetensors checkpoint: save it again with save_pretrained"
            )
        return [(key, SINGLE_FILE) for key in opened(SINGLE_FILE).keys()]  # noqa: SIM118
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}; copy the checkpoint again") from error
    for file in set(places.values()):  # an index may come from the network
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, which is outside the folder")
    return list(places.items())


def _named(
    model: PreTrainedModel, keys: list[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], str | None]]:
    """Yield every place with the parameter that it holds as it is, or None."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    prefix = model.base_model_prefix
    for key, file in keys:
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name = key
        yield (key, file), name if converted is None and name in state else None
