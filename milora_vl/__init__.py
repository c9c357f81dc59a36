"""Finetune LLaVA-style vision-language models with MiLoRA adapters, and evaluate them.

The public names are imported on first use, so that ``import milora_vl`` runs nothing.
"""

import importlib
from typing import Any

_HOMES = {
    "add_adapter_from": "milora_vl.adapter.checkpoint",
    "DecayToStart": "milora_vl.training.decay",
    "MiloraConfig": "milora_vl.config",
    "attach_milora": "milora_vl.adapter.attach",
    "load_adapter": "milora_vl.adapter.checkpoint",
    "load_vlm": "milora_vl.model.load",
    "merge_adapter": "milora_vl.export.merge",
    "minor_svd": "milora_vl.adapter.minor_svd",
    "remove_adapter": "milora_vl.adapter.checkpoint",
    "SavePortableAdapter": "milora_vl.training.portable",
    "save_adapter": "milora_vl.adapter.checkpoint",
    "use_adapter": "milora_vl.adapter.checkpoint",
}

__all__ = [  # noqa: RUF022  in the order in which they are used
    "load_vlm",
    "MiloraConfig",
    "attach_milora",
    "save_adapter",
    "load_adapter",
    "merge_adapter",
    "minor_svd",
    "add_adapter_from",
    "use_adapter",
    "remove_adapter",
    "SavePortableAdapter",
    "DecayToStart",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
