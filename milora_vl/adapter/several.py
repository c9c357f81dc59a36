"""Several adapters on one base at the same time: add, switch, remove.

All of them leave the base weights alone (residual "anchor"), so that none changes what another
computes, and the base is bit for bit the same when they are gone.
"""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from milora_vl.adapter.base_check import check_adapter, check_name
from milora_vl.adapter.portable import read_tensors_
from milora_vl.adapter.state import (
    activate,
    adapter_states,
    add_more_adapters_,
    anchor_of,
    current_adapter,
    forget,
    recall,
    remember,
    trains,
    unload_,
)
from milora_vl.model.shards import ShardedWeights


def add_adapter_from(
    peft_model: PeftModel,
    folder: Path | str,
    adapter_name: str,
    *,
    trainable: bool = False,
    strict_base: bool = True,
    weights: ShardedWeights | None = None,
) -> None:
    """Load a saved adapter beside those a model already has, and make it the active one.

    Args:
        peft_model: From ``load_adapter`` or ``attach_milora`` with residual "anchor".
        folder: Written by ``save_adapter``.
        adapter_name: Name of the new adapter on this model.
        trainable: Whether the new adapter trains.
        strict_base: Refuse a base whose weights are not those the adapter was made on.
        weights: Float weights on disk of a base that ``load_vlm`` quantised
            (``vlm.float_weights``), which tell whether it is the right one.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If the name is taken, another adapter changed the base weights, a file is
            damaged, the base is another one, or shapes do not fit. The model is then as before.
    """
    before = current_adapter(peft_model)
    mode, trained = peft_model.training, trains(peft_model, before)
    _check_shared_base(peft_model)
    check_name(adapter_name, set(peft_model.peft_config))
    base = peft_model.get_base_model()
    state = check_adapter(base, Path(folder), "anchor", strict_base=strict_base, weights=weights)
    try:
        add_more_adapters_(peft_model, state, adapter_name)
        read_tensors_(peft_model, state, Path(folder), adapter_name)
    except BaseException:
        _delete(peft_model, adapter_name, before, trainable=trained)
        peft_model.train(mode)
        raise
    remember(peft_model, state, adapter_name)
    use_adapter(peft_model, adapter_name, trainable=trainable)


def use_adapter(peft_model: PeftModel, adapter_name: str, *, trainable: bool = False) -> None:
    """Make one of the adapters, with its projector, the active one; the others rest.

    Args:
        peft_model: A model with several adapters.
        adapter_name: Which.
        trainable: Whether it trains; all others are frozen.

    Raises:
        ValueError: If there is no such adapter.
    """
    _check_known(peft_model, adapter_name)
    state = recall(peft_model, adapter_name)
    activate(peft_model, state.residual, trainable=trainable, adapter_name=adapter_name)
    for name in set(peft_model.peft_config) - {adapter_name}:
        peft_model.set_requires_grad(name, requires_grad=False)
    if not trainable:
        peft_model.eval()


def remove_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """Take one adapter off the model; if it was active, the oldest other one becomes active.

    An active adapter that stays goes on training if it did.

    Raises:
        ValueError: If there is no such adapter, or it is the last one.
    """
    _check_known(peft_model, adapter_name)
    others = [name for name in adapter_states(peft_model) if name != adapter_name]
    if not others:
        raise ValueError(
            f"{adapter_name!r} is the last adapter; unload_adapters(peft_model) gives the base back"
        )
    current = current_adapter(peft_model)
    following = others[0] if current == adapter_name else current
    trainable = current != adapter_name and trains(peft_model, current)
    forget(peft_model, adapter_name)
    _delete(peft_model, adapter_name, following, trainable=trainable)


def unload_adapters(peft_model: PeftModel) -> PreTrainedModel:
    """Take all adapters off and return the base model, its projector included, as it was.

    Raises:
        ValueError: If an adapter changed the base weights (residual "subtract").
    """
    _check_shared_base(peft_model)
    return unload_(peft_model, [state.projector for state in adapter_states(peft_model).values()])


def _delete(
    peft_model: PeftModel, adapter_name: str, following: str, *, trainable: bool = False
) -> None:
    """Delete an adapter and its anchor, and make another one active."""
    peft_model.set_adapter(following, inference_mode=True)  # PEFT deletes beside a single one only
    for name in (anchor_of(adapter_name), adapter_name):
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
    use_adapter(peft_model, following, trainable=trainable)


def _check_known(peft_model: PeftModel, adapter_name: str) -> None:
    known = list(adapter_states(peft_model))
    if adapter_name not in known:
        raise ValueError(f"there is no adapter {adapter_name!r}; this model has {known}")


def _check_shared_base(peft_model: PeftModel) -> None:
    for name, state in adapter_states(peft_model).items():
        if state.residual == "subtract":
            raise ValueError(
                f"adapter {name!r} changed the base weights (residual='subtract'), so they are no "
                "base for others; load it with load_adapter(..., residual='anchor')"
            )
