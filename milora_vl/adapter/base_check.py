"""Check a saved adapter against the base model it is to go on, before anything is changed."""

import logging
from collections.abc import Collection
from pathlib import Path

from torch import nn

from milora_vl.adapter.fingerprint import PRECISIONS, fingerprint
from milora_vl.adapter.portable import MiloraFile, check_files, check_shapes, read_milora_file
from milora_vl.adapter.quantize import is_quantised
from milora_vl.adapter.state import MiloraState, Residual, anchor_of
from milora_vl.adapter.targets import find_projector, resolve_residual
from milora_vl.model.shards import ShardedWeights

logger = logging.getLogger(__name__)


def check_adapter(
    model: nn.Module,
    folder: Path,
    residual: Residual | None,
    *,
    strict_base: bool,
    weights: ShardedWeights | None = None,
) -> MiloraState:
    """Check a saved adapter against a base model, which stays as it is.

    Args:
        model: The original base; its layers may already be wrapped by PEFT.
        folder: Written by ``save_adapter``.
        residual: As for ``load_adapter``.
        strict_base: As for ``load_adapter``.
        weights: As for ``load_adapter``.

    Returns:
        What the model will have to remember of the adapter.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is damaged, the base is another one, or shapes do not fit.
    """
    facts = read_milora_file(folder)
    check_files(folder, facts)
    _check_layers_exist(model, facts, folder)
    weights = _check_base(model, facts, folder, strict_base, weights)
    if not facts.state().has_anchor:
        residual = "anchor"  # nothing to subtract: the base weights stay
    elif residual is None:
        # a low-precision base would lose part of the slice to rounding, see the certificate
        possible = resolve_residual(model, facts.modules, "auto", weights is not None)
        residual = facts.residual if possible == "subtract" else "anchor"
    state = facts.state(resolve_residual(model, facts.modules, residual, weights is not None))
    check_shapes(model, state, folder)
    return state


def check_name(adapter_name: str, taken: Collection[str] = ()) -> None:
    """Refuse a name that PEFT cannot give to an adapter of ours.

    Raises:
        ValueError: If it is taken, empty, or would hide something of the modules that hold it.
    """
    hidden = hasattr(nn.ModuleDict(), adapter_name) or hasattr(nn.ParameterDict(), adapter_name)
    clash = {adapter_name, anchor_of(adapter_name)} & {*taken}
    if clash or hidden or "." in adapter_name or not adapter_name:
        raise ValueError(
            f"{adapter_name!r} cannot name a new adapter: choose a name without a dot that is none "
            f"of {sorted(taken)} and no attribute of a torch module, as 'half' or 'train' are"
        )


def _check_layers_exist(model: nn.Module, facts: MiloraFile, folder: Path) -> None:
    present = {name for name, _ in model.named_modules()}
    missing = [name for name in facts.modules if name not in present]
    if missing:
        raise ValueError(
            f"{folder}: the model has no layer {missing[0]} ({len(missing)} of "
            f"{len(facts.modules)} are missing); the adapter was made on {facts.base}"
        )
    if facts.projector and find_projector(model) != facts.projector:
        raise ValueError(f"{folder}: the model has no projector {facts.projector}")


def _check_base(
    model: nn.Module,
    facts: MiloraFile,
    folder: Path,
    strict_base: bool,
    weights: ShardedWeights | None,
) -> ShardedWeights | None:
    """Compare fingerprints; return the float weights, unless those in memory are the right ones."""
    found = fingerprint(model, facts.modules, weights)["exact"]
    match = [precision for precision in PRECISIONS if facts.fingerprint[precision] == found]
    if match and match[0] != "exact":
        logger.info("%s: same base, its weights rounded to %s", folder, match[0])
    if match:
        return weights
    quantised = any(is_quantised(model.get_submodule(name).weight) for name in facts.modules)
    if weights is not None and facts.fingerprint == fingerprint(model, facts.modules):
        return None  # made on the 4-bit weights as they are
    message = (
        f"{folder} was made on other weights: base {facts.base['name_or_path']} (revision "
        f"{facts.base['revision']}) has fingerprint {facts.fingerprint['exact'][:16]}, this model "
        f"({getattr(model, 'name_or_path', '') or type(model).__name__}"
        f"{', quantised' if quantised else ''}) has {found[:16]}. Load the original base"
        f"{', or pass weights=vlm.float_weights of load_vlm' if quantised and not weights else ''}"
    )
    if strict_base:
        raise ValueError(
            f"{message}; strict_base=False loads it all the same, and then the model computes "
            "something else than it was trained to"
        )
    logger.warning(message)
    return weights
