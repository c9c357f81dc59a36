"""Errors while a model is loaded, each with what to do about it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from milora_vl.errors import MiloraError


class LoadError(MiloraError, RuntimeError):
    """A model that cannot be loaded; the text says why and what to do."""


def explain(path: str, error: Exception, revision: str | None = None) -> LoadError:
    """Return the error to raise for one that transformers or the hub client raised."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    # transformers wraps the errors of the hub client, so the reason may be anywhere in the chain
    chain, cause = [], error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(one) for one in chain).lower()
    if any(isinstance(one, GatedRepoError) for one in chain) or "gated" in text:
        return LoadError(
            f"{path}: this model is gated: accept its terms on its hub page, then log in once with "
            f"`hf auth login` (or set HF_TOKEN). {first}"
        )
    if "safetensors" in text and ("no file named" in text or "does not appear to have" in text):
        return LoadError(
            f"{path}: no safetensors weights. Pickle files can run code of whoever made them; if "
            "you trust the source, pass allow_pickle=True (config: model.allow_pickle=true; "
            f"compose: --allow-pickle), or convert the checkpoint once. {first}"
        )
    if "trust_remote_code" in text:
        return LoadError(
            f"{path}: this checkpoint contains code, which does not run unless you allow it. If "
            "you have read and trust it: trust_remote_code=True (model.trust_remote_code in a "
            f"config). Many such models also exist for transformers' own classes. {first}"
        )
    if any(isinstance(one, RevisionNotFoundError) for one in chain):
        return LoadError(f"{path}: the hub has no revision {revision!r} of it. {first}")
    if Path(path).exists():
        return LoadError(f"{path}: {first}")
    if constants.HF_HUB_OFFLINE:
        return LoadError(
            f"{path}: neither a folder here nor found in the hub's cache, and HF_HUB_OFFLINE is "
            f"set. Unset it, or download the checkpoint elsewhere and pass its folder. {first}"
        )
    login = any(isinstance(one, RepositoryNotFoundError) for one in chain)
    return LoadError(
        f"{path}: neither a folder here nor found on the hub"
        + (" (a private one needs `hf auth login`)" if login else "")
        + f". Without a network connection, download the checkpoint elsewhere and pass its folder. "
        f"{first}"
    )


def check_complete(
    path: str, model: PreTrainedModel, report: Mapping[str, Any], unused: str | None = None
) -> None:
    """Refuse a checkpoint that lacks weights: transformers fills them at random.

    Args:
        path: Of the checkpoint, for the message.
        model: What was loaded.
        report: From ``from_pretrained(..., output_loading_info=True)``.
        unused: A part of the model whose weights nothing needs.

    Raises:
        LoadError: Naming the first weight that is missing.
    """
    missing = sorted(report["missing_keys"])
    if unused is not None:
        missing = [name for name in missing if unused not in name.split(".")]
    if missing:
        raise LoadError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, the first is "
            f"{missing[0]}; they would be random. Copy the checkpoint again, or give the one that "
            "it belongs to (an adapter or a projector alone is no model)"
        )


@contextmanager
def explained_memory(path: str) -> Iterator[None]:
    """Turn a lack of memory inside the block into a ``LoadError`` that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = ("out of memory", "can't allocate memory", "not enough memory")
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and not any(word in str(error).lower() for word in words):
            raise
        raise LoadError(
            f"{path}: not enough memory to load it. Load it in 4 bits (quantization='nf4'), in "
            "dtype bfloat16, or on another device; for training also lower "
            "per_device_train_batch_size and turn gradient_checkpointing on. "
            f"{next(iter(str(error).splitlines()), '')}"
        ) from error
