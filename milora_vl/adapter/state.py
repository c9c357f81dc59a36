"""A model with a MiLoRA adapter: its two PEFT adapters, their metadata, which are active.

A projector that trains in full beside the adapter gets float32 master weights. A bfloat16 weight
keeps 8 bits, so an optimizer step of a thousandth of its size would be rounded away. The optimizer
moves the float32 values; the module computes with the same values rounded to its own dtype.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from milora_vl.adapter.experts import Stack, is_transposed, layer_of, wrapper_of
from milora_vl.adapter.fused import Rows
from milora_vl.runtime import full_precision

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Rounded(nn.Module):
    """Parametrization of a float32 master weight that is used in a lower precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Use the weight in ``dtype``."""
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        """Return the weight to compute with."""
        return master.to(self.dtype)


def keep_master_weights_(module: nn.Module) -> None:
    """Give every low-precision parameter of ``module`` a float32 master; its output stays."""
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dtype in LOW_PRECISION:
                master = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                setattr(owner, name, master)
                # unsafe: the dtype differs between master and weight, which is the point
                rounded = Rounded(parameter.dtype)
                parametrize.register_parametrization(owner, name, rounded, unsafe=True)


def remove_master_weights_(module: nn.Module) -> None:
    """Undo ``keep_master_weights_``: the rounded weights become plain parameters again."""
    for owner in list(module.modules()):
        if parametrize.is_parametrized(owner):
            for name in list(owner.parametrizations):
                weight = getattr(owner, name).detach()
                parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
                setattr(owner, name, nn.Parameter(weight, getattr(owner, name).requires_grad))


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of ``module`` under its plain names, master weights in float32."""
    return {plain_name(name): value for name, value in module.state_dict().items()}


def load_trained_state_(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill ``module`` from what ``trained_state`` returned.

    Raises:
        RuntimeError: If names or shapes do not fit.
    """
    module.load_state_dict({name: state[plain_name(name)] for name in module.state_dict()})


def plain_name(name: str) -> str:
    """Return the name a parameter has without its parametrization."""
    return name.replace("parametrizations.", "").removesuffix(".original")


MILORA = "milora"
ANCHOR = "anchor"
CORRECTION = "correction"

PLAIN_INITS = ("lora", "rslora", "dora", "mica")
"""Methods whose factors multiply to zero at the start: nothing to subtract, so no anchor."""

Residual = Literal["subtract", "anchor"]


@dataclass(frozen=True)
class MiloraState:
    """Metadata of an attached adapter, which its tensors do not show.

    Attributes:
        r: Adapter rank of one projection.
        lora_alpha: LoRA alpha; the scaling is lora_alpha / r.
        slice: Part of the spectrum the adapter started from; "none" if from no slice.
        svd: Requested SVD method.
        residual: "subtract": the base weights were replaced by W_p; "anchor": they are untouched
            (always so for ``PLAIN_INITS``).
        lora_dropout: Dropout of the trainable adapter.
        modules: Full names of the adapted layers.
        projector: Full name of the projector that trains in full, or None.
        fingerprint: Of the original weights of ``modules``, see ``fingerprint.py``.
        init: Method that gave the first values, see ``milora_vl.config.MiloraConfig``.
        quantization_correction: "low_rank" if a 4-bit residual has a frozen correction.
        scale: "none" if the start has orthonormal factors, without the singular values.
        rank_pattern: Full name -> r, for layers with another one.
        alpha_pattern: Full name -> lora_alpha, for layers with another one.
        blocks: Full name -> (groups, *sizes) of ``Rows``, for fused layers whose projections have
            r directions each.
        experts: Full name -> (count, transposed, depth) of ``Stack``, for those of ``modules`` that
            are tensors of experts: each has rank r.
    """

    r: int
    lora_alpha: float
    slice: str
    svd: str
    residual: Residual
    lora_dropout: float
    modules: tuple[str, ...]
    projector: str | None
    fingerprint: dict[str, str]
    init: str = "milora"
    quantization_correction: str = "none"
    scale: str = "singular"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    experts: dict[str, tuple[int, bool, int]] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Factor before B A of most layers, see ``scaling_of``."""
        return self._scaling(self.lora_alpha, self.r)

    def scaling_of(self, name: str) -> float:
        """Factor before B A of one layer: lora_alpha / r, for rsLoRA lora_alpha / sqrt(r)."""
        alpha = self.alpha_pattern.get(name, self.lora_alpha)
        return self._scaling(alpha, self.rank_pattern.get(name, self.r))

    def _scaling(self, alpha: float, r: int) -> float:
        return alpha / (r**0.5 if self.init == "rslora" else r)

    def rows_of(self, name: str) -> Rows | None:
        """Return how the projections of a fused layer share its rows; None if it is one block."""
        if name not in self.blocks:
            return None
        groups, *sizes = self.blocks[name]
        return Rows(groups, tuple(sizes))

    def stack_of(self, name: str) -> Stack | None:
        """Return how a tensor of experts is kept; None for a linear layer."""
        return Stack(*self.experts[name]) if name in self.experts else None

    def peft_targets(self) -> dict[str, list[str]]:
        """Return PEFT's keys for the layers and, if there are any, for the tensors of experts."""
        layers = [name for name in self.modules if name not in self.experts]
        experts = {"target_parameters": list(self.experts)} if self.experts else {}
        return {"target_modules": layers, **experts}

    def rank_of(self, name: str) -> int:
        """Return the rank of the trainable adapter on one layer: r a block."""
        rows = self.rows_of(name)
        return self.rank_pattern.get(name, self.r) * (rows.count if rows else 1)

    def peft_ranks(self, widening: int = 1, *, plain: bool = False) -> dict[str, Any]:
        """Return PEFT's keys for rank and alpha, of all layers and of those that differ.

        The scaling of a layer does not depend on ``widening`` or on its number of blocks, so a
        reader that takes ``lora_alpha / r`` for all layers scales fused ones rightly too.

        Args:
            widening: Factor on all ranks: 2 for [A; A0].
            plain: Write rsLoRA's scaling as alpha / r.
        """
        rooted = plain and self.init == "rslora"
        ranks, alphas = {}, {}
        for name in self.modules:
            r = self.rank_pattern.get(name, self.r)
            times = widening * (self.rank_of(name) // r)
            alpha = self.alpha_pattern.get(name, self.lora_alpha) * (r**0.5 if rooted else 1)
            ranks[name], alphas[name] = times * r, whole_number(times * alpha)
        r = widening * self.r
        alpha = whole_number(widening * self.lora_alpha * (self.r**0.5 if rooted else 1))
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": _by_ending(ranks, r),
            "alpha_pattern": _by_ending(alphas, alpha),
        }

    @property
    def has_anchor(self) -> bool:
        """Whether the start (A0, B0) is subtracted by a second adapter."""
        return self.init not in PLAIN_INITS

    @property
    def widening(self) -> int:
        """Rank of the plain LoRA that does the same on the original base, over r."""
        return 2 if self.has_anchor else 1


def whole_number(value: float) -> float:
    """Return a whole value as an integer: readers in Go refuse 8.0 where they expect 8."""
    return int(value) if float(value).is_integer() else value


def _by_ending(values: dict[str, float], default: float) -> dict[str, Any]:
    """Return what differs from the default as patterns of PEFT: by last name where that tells."""
    endings = defaultdict(set)
    for name, value in values.items():
        endings[name.rpartition(".")[2]].add(value)
    patterns = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if len(endings[last]) == 1 and value != default:
            patterns[last] = value
        elif value != default:
            patterns[name] = value
    return patterns


def anchor_of(adapter_name: str) -> str:
    """Return the name of the frozen adapter that belongs to a trainable one."""
    return ANCHOR if adapter_name == MILORA else f"{adapter_name}_{ANCHOR}"


def remember(peft_model: PeftModel, state: MiloraState, adapter_name: str = MILORA) -> None:
    """Keep ``state`` with the model, so that it survives copies and wrapping."""
    peft_model.milora_states = {**adapter_states(peft_model), adapter_name: state}


def forget(peft_model: PeftModel, adapter_name: str) -> None:
    """Undo ``remember``."""
    states = adapter_states(peft_model)
    peft_model.milora_states = {name: states[name] for name in states if name != adapter_name}


def adapter_states(peft_model: nn.Module) -> dict[str, MiloraState]:
    """Return adapter name -> state of all adapters of this package on a model."""
    return getattr(peft_model, "milora_states", {})


def recall(peft_model: nn.Module, adapter_name: str | None = None) -> MiloraState:
    """Return the state kept with a model that ``attach_milora`` or ``load_adapter`` made.

    Args:
        peft_model: The model.
        adapter_name: Whose state; default: of the active adapter.

    Raises:
        ValueError: If the model has none.
    """
    return adapter_states(peft_model)[adapter_name or current_adapter(peft_model)]


def current_adapter(peft_model: nn.Module) -> str:
    """Return the name of the active adapter, its anchor not counted.

    Raises:
        ValueError: If the model has no adapter of this package, or several and none is active.
    """
    states = adapter_states(peft_model)
    if not states:
        raise ValueError(
            f"this {type(peft_model).__name__} was not made by attach_milora or load_adapter; "
            "if a trainer wrapped it, pass the unwrapped PeftModel"
        )
    active = [name for name in peft_model.active_adapters if name in states] or list(states)
    if len(active) > 1:
        raise ValueError(f"name one of the adapters {active}, or make one active with use_adapter")
    return active[0]


def add_adapters(
    model: PreTrainedModel, state: MiloraState, adapter_name: str = MILORA
) -> PeftModel:
    """Wrap a model with the adapters of ``state``.

    The factors are arbitrary, except for LoRA, rsLoRA and DoRA, which PEFT initializes here.
    """
    config = trainable_config(state)
    # float32 factors also on bfloat16 bases: PEFT then adds both products in float32 and rounds
    # once, so the anchor cancels the untrained adapter exactly
    peft_model = get_peft_model(
        model, config, adapter_name=adapter_name, autocast_adapter_dtype=True
    )
    _complete(peft_model, state, adapter_name)
    return peft_model


def add_more_adapters_(peft_model: PeftModel, state: MiloraState, adapter_name: str) -> None:
    """Put the adapters of ``state`` beside those a model already has."""
    config = trainable_config(state)
    peft_model.add_adapter(adapter_name, config, autocast_adapter_dtype=True)
    _complete(peft_model, state, adapter_name)


def trainable_config(state: MiloraState) -> LoraConfig:
    """Return PEFT's configuration of the adapter that trains."""
    return LoraConfig(
        **state.peft_ranks(),
        **state.peft_targets(),
        bias="none",
        init_lora_weights=state.init in ("lora", "rslora", "dora"),
        use_rslora=state.init == "rslora",
        use_dora=state.init == "dora",
        lora_dropout=state.lora_dropout,
        modules_to_save=[state.projector] if state.projector else None,
    )


def _complete(peft_model: PeftModel, state: MiloraState, adapter_name: str) -> None:
    if state.has_anchor:
        anchor = LoraConfig(
            **state.peft_ranks(),
            **state.peft_targets(),
            bias="none",
            init_lora_weights=False,
        )
        peft_model.add_adapter(anchor_of(adapter_name), anchor, autocast_adapter_dtype=True)
    if state.projector:
        keep_master_weights_(trained_projector(peft_model, state.projector, adapter_name))


def trained_projector(peft_model: PeftModel, name: str, adapter_name: str = MILORA) -> nn.Module:
    """Return the copy of the projector that trains; the original stays beside it."""
    return peft_model.get_base_model().get_submodule(name).modules_to_save[adapter_name]


def magnitude(peft_model: PeftModel, name: str, adapter_name: str = MILORA) -> Tensor:
    """Return DoRA's magnitude vector [d_out] of one layer (not a copy)."""
    return lora_layer(peft_model, name).lora_magnitude_vector[adapter_name].weight


def subtract_anchor_(
    peft_model: PeftModel, modules: Sequence[str], adapter_name: str = MILORA
) -> None:
    """Write W_p = W - s B0 A0 into the base weights, in their own dtype."""
    anchor = anchor_of(adapter_name)
    for name in modules:
        layer = lora_layer(peft_model, name)
        lora_A, negative_lora_B = factors(peft_model, name, anchor)
        weight = base_layer(peft_model, name).weight
        if weight.ndim == 3:
            stack = Stack(weight.shape[0], is_transposed(layer.get_base_layer()))
            values = weight.detach().to(torch.float32, copy=True)
            both = lora_A.detach(), negative_lora_B.detach()
            weight.data.copy_(stack.add_(values, *both, layer.scaling[anchor]))
            continue
        with full_precision():
            negative_minor = negative_lora_B.detach() @ lora_A.detach()  # [d_out, d_in]
        negative_minor.mul_(layer.scaling[anchor])
        weight.data.copy_(weight.detach().to(torch.float32) + negative_minor)


def check_not_merged(peft_model: PeftModel) -> None:
    """Refuse a model whose adapters PEFT has added to the base weights (``merge_adapter``).

    Its weights are then neither the base's nor W_p, so that a second merge, or taking the adapters
    off, would silently give another model.

    Raises:
        ValueError: Naming the first merged layer.
    """
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer) and module.merged:
            raise ValueError(
                f"{name}: PEFT has merged {', '.join(module.merged_adapters)} into the base weight "
                "(peft_model.merge_adapter()); call peft_model.unmerge_adapter() first"
            )


def lora_layer(peft_model: PeftModel, name: str) -> LoraLayer:
    """Return the PEFT layer that wraps the base layer of full name ``name``."""
    return wrapper_of(peft_model.get_base_model(), name)


def base_layer(peft_model: PeftModel, name: str) -> Any:
    """Return what holds the weight of a target: the linear layer, or the tensor of experts."""
    return layer_of(peft_model.get_base_model(), name)


def factors(peft_model: PeftModel, name: str, adapter: str) -> tuple[Tensor, Tensor]:
    """Return lora_A [r, d_in] and lora_B [d_out, r] of one adapter on one layer (not copies)."""
    if adapter in _parked(peft_model):
        lora_A, lora_B = _parked(peft_model)[adapter][name]
    else:
        layer = lora_layer(peft_model, name)
        lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
    return lora_A.weight, lora_B.weight


def _parked(peft_model: nn.Module) -> dict[str, dict[str, tuple[nn.Module, nn.Module]]]:
    """Return anchor name -> layer name -> lora_A and lora_B, for anchors held outside the model."""
    return getattr(peft_model, "milora_parked_anchors", {})


def park_anchor_(peft_model: PeftModel, anchor: str, modules: Sequence[str]) -> None:
    """Take an inactive anchor out of the model's layers and hold it on the CPU.

    With residual "subtract" the anchor is needed for saving only. A plain dict holds it: a module
    would follow the model to its device (1.2 GiB at 7B), and DistributedDataParallel would refuse
    a module on two kinds of devices. ``factors`` finds it there; ``restore_anchor_`` undoes this.
    """
    if anchor in _parked(peft_model):
        return
    held = {}
    for name in modules:
        layer = lora_layer(peft_model, name)
        held[name] = (layer.lora_A.pop(anchor).to("cpu"), layer.lora_B.pop(anchor).to("cpu"))
    peft_model.milora_parked_anchors = {**_parked(peft_model), anchor: held}


def restore_anchor_(peft_model: PeftModel, anchor: str) -> None:
    """Put a parked anchor back into the layers, each on the device of its layer."""
    parked = dict(_parked(peft_model))
    for name, (lora_A, lora_B) in parked.pop(anchor, {}).items():
        layer = lora_layer(peft_model, name)
        device = base_layer(peft_model, name).weight.device
        layer.lora_A[anchor], layer.lora_B[anchor] = lora_A.to(device), lora_B.to(device)
    peft_model.milora_parked_anchors = parked


def activate(
    peft_model: PeftModel, residual: Residual, *, trainable: bool, adapter_name: str = MILORA
) -> None:
    """Make the adapters take part as ``residual`` needs, and freeze what must not train.

    With residual "subtract" the anchor leaves the layers for the CPU. The anchor never trains. PEFT
    sets it trainable again whenever it activates adapters, for example on leaving
    ``peft_model.disable_adapter()``; call this afterwards.
    """
    anchor, active = anchor_of(adapter_name), [adapter_name]
    always = corrections(peft_model)
    has_anchor = anchor in peft_model.peft_config
    if residual == "anchor" and has_anchor:
        restore_anchor_(peft_model, anchor)
        active.append(anchor)
    peft_model.base_model.set_adapter([*active, *always], inference_mode=not trainable)
    for frozen in [*([anchor] if has_anchor else []), *always]:
        peft_model.set_requires_grad(frozen, requires_grad=False)
    state = adapter_states(peft_model).get(adapter_name)
    if state and residual == "subtract" and has_anchor:
        park_anchor_(peft_model, anchor, state.modules)
    if state and state.init == "mica":  # MiCA trains A alone
        for name in state.modules:
            factors(peft_model, name, adapter_name)[1].requires_grad_(False)


def trains(peft_model: PeftModel, adapter_name: str) -> bool:
    """Tell whether an adapter is one that an optimizer would move."""
    state = recall(peft_model, adapter_name)
    return factors(peft_model, state.modules[0], adapter_name)[0].requires_grad


def unload_(peft_model: PeftModel, projectors: Iterable[str | None]) -> PreTrainedModel:
    """Take PEFT's layers off again, and put back the original of every trained projector."""
    base = peft_model.get_base_model()
    originals = {name: base.get_submodule(name).original_module for name in set(projectors) if name}
    model = peft_model.unload()
    for name, original in originals.items():  # PEFT leaves the trained copy in its place
        model.set_submodule(name, original.requires_grad_(False))
    return model


def corrections(peft_model: PeftModel) -> list[str]:
    """Return the name of the 4-bit base's correction, if it has one: it is always active."""
    has_one = CORRECTION in peft_model.peft_config
    return [CORRECTION] if has_one and CORRECTION not in adapter_states(peft_model) else []


@contextmanager
def pretrained_function(peft_model: PeftModel) -> Iterator[PeftModel]:
    """Let the model compute what the pretrained base computes, for the length of a ``with`` block.

    ``peft_model.disable_adapter()`` alone would leave W_p without its minor part in subtract mode.

    Raises:
        ValueError: If the model carries no MiLoRA adapter, or PEFT has merged it.
    """
    check_not_merged(peft_model)
    state, adapter_name = recall(peft_model), current_adapter(peft_model)
    anchor = anchor_of(adapter_name)
    flags = {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    layers = [lora_layer(peft_model, name) for name in state.modules]
    try:
        if state.residual == "subtract":
            # the anchor holds (A0, -B0); with its scale negated the layer is W_p + s B0 A0 = W
            restore_anchor_(peft_model, anchor)
            active = [anchor, *corrections(peft_model)]
            peft_model.base_model.set_adapter(active, inference_mode=True)
            for layer in layers:
                layer.set_scale(anchor, -1.0)
            yield peft_model
        else:
            with peft_model.disable_adapter():
                yield peft_model
    finally:
        if state.residual == "subtract":
            for layer in layers:
                layer.set_scale(anchor, 1.0)
        activate(peft_model, state.residual, trainable=True, adapter_name=adapter_name)
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(flags[name])
