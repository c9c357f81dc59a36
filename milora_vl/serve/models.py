"""One base in memory and the adapters on it: which model a request's name means."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel

from milora_vl.adapter.checkpoint import add_adapter_from, load_adapter, use_adapter
from milora_vl.adapter.state import (
    adapter_states,
    current_adapter,
    recall,
    remove_master_weights_,
    trained_projector,
)
from milora_vl.adapter.tuned import Found, apply_inputs, put_on, read_adapter
from milora_vl.model.families import find_family
from milora_vl.model.load import VLM, load_vlm
from milora_vl.model.prompting import choose_prompt_style


@dataclass(frozen=True)
class ServedModel:
    """What one model name of the API stands for.

    Attributes:
        name: By which requests ask for it.
        vlm: The model in memory, the same for all, and how prompts are written for this one.
        adapter: PEFT's name of its adapter; None for the base.
    """

    name: str
    vlm: VLM
    adapter: str | None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the model in memory compute as this one while the context lasts."""
        model = self.vlm.model
        if not isinstance(model, PeftModel):
            yield
        elif self.adapter is None:
            with model.disable_adapter():
                yield
        else:
            states = adapter_states(model)
            if self.adapter in states and current_adapter(model) != self.adapter:
                use_adapter(model, self.adapter)
            yield


def load_served(
    model: str | None,
    adapters: Mapping[str, Path | str],
    *,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    quantization: Literal["nf4"] | None = None,
) -> list[ServedModel]:
    """Load a base and its adapters, all ready to answer.

    Args:
        model: Id or folder of the base; None: the one that the adapters name.
        adapters: Name for requests -> run, checkpoint or adapter folder. Adapters of other
            trainers can be served alone, those of this package beside one another.
        device: "cpu", "cuda", ... or "auto".
        dtype: Of the base; "auto": as the first adapter was trained, else the checkpoint's.
        quantization: "nf4" brings the language model to 4 bits.

    Returns:
        The base first, then the adapters in their order.

    Raises:
        ValueError: If no base is known, adapters name several, or they cannot share one.
        FileNotFoundError: If there is no adapter.
        milora_vl.model.load_errors.LoadError: If the base cannot be loaded.
    """
    found = {name: read_adapter(path) for name, path in adapters.items()}
    base = model or _common_base(found)
    first = next(iter(found.values()), None)
    if dtype == "auto" and first and first.dtype is not None:
        dtype = first.dtype
    if first and first.is_nf4 and quantization is None:
        quantization = "nf4"
    revision = first.revision if first and first.base == base else None
    vlm = load_vlm(base, dtype=dtype, device=device, quantization=quantization, revision=revision)
    name = Path(base).name if Path(base).exists() else base
    if name in found:
        raise ValueError(f"--adapter {name}: that is the name of the base; choose another one")
    _check_together(found)
    styled = {key: _with_style(vlm, one) for key, one in found.items()}
    if first and not first.is_ours:
        (key,) = found
        tuned = put_on(styled[key], first)
        states = [ServedModel(key, tuned, tuned.model.active_adapters[0])]
        return [ServedModel(name, vlm.with_model(tuned.model), None), *states]
    peft_model = None
    for index, (key, one) in enumerate(found.items()):
        inner = f"served_{index}"  # names of requests may hold dots, those of PEFT may not
        if peft_model is None:
            peft_model = load_adapter(
                vlm.model,
                one.folder,
                residual="anchor",
                adapter_name=inner,
                weights=vlm.float_weights,
            )
        else:
            add_adapter_from(peft_model, one.folder, inner, weights=vlm.float_weights)
        if projector := recall(peft_model, inner).projector:
            remove_master_weights_(trained_projector(peft_model, projector, inner))
        styled[key] = apply_inputs(styled[key], one.inputs, one.folder)
    live = (peft_model or vlm.model).eval()
    return [
        ServedModel(name, vlm.with_model(live), None),
        *(
            ServedModel(key, one.with_model(live), f"served_{index}")
            for index, (key, one) in enumerate(styled.items())
        ),
    ]


def _common_base(found: Mapping[str, Found]) -> str:
    bases = {one.base for one in found.values()}
    if len(bases) > 1:
        raise ValueError(
            f"the adapters name several bases, {sorted(map(str, bases))}; --model says which"
        )
    base = next(iter(bases), None)
    if not base:
        raise ValueError("which model? pass --model, or an --adapter that names its base")
    return str(base)


def _check_together(found: Mapping[str, Found]) -> None:
    """Refuse adapters that cannot stand on one base at a time."""
    others = [name for name, one in found.items() if not one.is_ours]
    if others and len(found) > 1:
        raise ValueError(
            f"--adapter {others[0]}: adapters of other trainers are served alone; merge it, or "
            "start a second server"
        )
    layers = {one.inputs.get("vision_feature_layer") for one in found.values()} - {None}
    if len(layers) > 1:
        raise ValueError(
            f"the adapters were trained on different layers of the vision tower ({layers}), "
            "which one server cannot switch"
        )


def _with_style(vlm: VLM, found: Found) -> VLM:
    style = found.inputs.get("prompt_style")
    if style in (None, vlm.prompt_style.name):
        return vlm
    family = find_family(vlm.model)
    return replace(vlm, prompt_style=choose_prompt_style(style, family, vlm.model, vlm.processor))
