"""Which layers get an adapter: the language model's attention and MLP projections, by full name.

A preset such as "all-linear" tells projections by the names that model authors give them, and
takes known names only. Routers, gates and the index of sparse attention are skipped and reported.
A layer that fuses several projections is one target, whose blocks of rows ``fused.py`` tells.
Experts kept in one tensor are skipped and reported, a model without known projections is
refused. Patterns and lists of names are matched as in PEFT, inside the language model only.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from milora_vl.adapter.experts import layer_of
from milora_vl.adapter.fused import GATE_UP_NAMES, Rows, is_fused, rows_of
from milora_vl.adapter.minor_svd import check_weight
from milora_vl.adapter.quantized import is_quantized
from milora_vl.model.families import PROJECTOR_NAMES, TOWER_NAMES, find_family

V = TypeVar("V")

_ATTENTION_NAME = re.compile(
    r"[qkvo]_proj|out_proj|[qk]_[ab]_proj|kv_b_proj|kv_a_proj_with_mqa|query|key|value|[qkvo]|"
    r"w[qkvo]|attn_out|in_proj_z"
)
_MLP_NAME = re.compile(
    r"(gate|up|down)_proj|fc[12]|fc_(in|out)|w[123]|c_fc(_[01])?|wi(_[01])?|dense_h_to_4h|"
    r"dense_4h_to_h|linear_[12v]|lin[12]"
)
_EITHER_NAME = re.compile(r"dense|c_proj|proj|linear|output|wo")  # told by the block around it
_ROUTER_NAME = re.compile(r"gate|router|shared_expert_gate")
_ATTENTION_BLOCK = re.compile(r"attn|attention", re.IGNORECASE)
_OTHER_BLOCK = re.compile(r"gate$|indexer|conv|mamba|ssm", re.IGNORECASE)
_MLP_BLOCK = re.compile(
    r"mlp|feed_?forward|ffn|\bff\b|expert|moe|intermediate|dense\w*dense|^output$", re.IGNORECASE
)


def kind_of(name: str) -> str | None:
    """Tell what a linear layer of a decoder is: "attention", "mlp", "router" or None.

    Args:
        name: Its full name. Layers outside a numbered decoder layer are None.
    """
    *blocks, last = name.split(".")
    numbers = [place for place, block in enumerate(blocks) if block.isdigit()]
    if _ROUTER_NAME.fullmatch(last):
        return "router"
    around = blocks[numbers[0] + 1 :] if numbers else []
    if not numbers or any(_OTHER_BLOCK.search(block) for block in around):
        return None
    if is_fused(last):
        return "mlp" if last in GATE_UP_NAMES else "attention"
    in_attention = any(_ATTENTION_BLOCK.search(block) for block in around)
    in_mlp = not in_attention and any(_MLP_BLOCK.search(block) for block in around)
    if _EITHER_NAME.fullmatch(last):
        return "attention" if in_attention else "mlp" if in_mlp else None
    if _MLP_NAME.fullmatch(last):
        return "mlp"
    is_bare = not around or (around == ["mixer"] and last != "out_proj")
    return "attention" if _ATTENTION_NAME.fullmatch(last) and (in_attention or is_bare) else None


def holds_experts(name: str, module: nn.Module) -> bool:
    """Tell whether a module of a decoder layer keeps several experts in one tensor."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not re.search(r"\.\d+\.", name):
        return False
    return any(p.dim() == 3 and len(p) > 1 for p in module.parameters(recurse=False))


PRESETS = {
    "all-linear": re.compile(r"attention .*|mlp .*"),
    "attention": re.compile(r"attention .*"),
    "mlp": re.compile(r"mlp .*"),
    "gate_up": re.compile(rf"mlp (gate_proj|up_proj|w1|w3|{'|'.join(GATE_UP_NAMES)})"),
}
"""Named choices of ``target_modules``: patterns of "kind last-name" of a layer."""


@dataclass(frozen=True)
class Targets:
    """The outcome of matching ``target_modules`` against a model.

    Attributes:
        modules: Full names of the linear layers that get an adapter, in model order.
        skipped: Full name -> reason, for layers of the language model without an adapter.
        projector: Full name of the vision-language projector, or None in a text model.
        rows: Full name -> how its projections share its rows, for fused layers.
        experts: Full names of the tensors that keep all experts of a layer; whether they get an
            adapter is for ``choose_experts``.
    """

    modules: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    projector: str | None = None
    rows: dict[str, Rows] = field(default_factory=dict)
    experts: tuple[str, ...] = ()


def find_targets(
    model: PreTrainedModel,
    target_modules: str | Sequence[str],
    *,
    allow_outside: bool = False,
    fused: Literal["blocks", "whole"] = "blocks",
) -> Targets:
    """Resolve ``target_modules`` to full names of linear layers of the language model.

    Args:
        model: A LLaVA-style model or a plain causal language model; its weights may be absent
            (meta device).
        target_modules: a name in ``PRESETS``; or a regular expression that must match a full module
            name; or a list of full names or name endings (``q_proj``), as in PEFT.
        allow_outside: Accept linear layers of the vision tower and the output head as well.
        fused: Whether the projections of a fused layer are told apart ("blocks") or not ("whole").

    Raises:
        ValueError: If a pattern is no regular expression, matches nothing, or reaches the vision
            tower, the projector, the output head or a layer that cannot be decomposed; the message
            ends with a choice that this model accepts. Or if the rows of a fused layer cannot be
            told apart.
    """
    family = find_family(model)
    language_model, projector = family.language_model, family.projector
    if isinstance(target_modules, str) and target_modules in PRESETS:
        modules, skipped = _preset(model, language_model, target_modules)
    else:
        modules = _matching(model, language_model, target_modules, allow_outside)
        skipped = {}
        if taken := _taken_for_experts(model, modules):
            raise ValueError(
                f"target_modules={target_modules!r} names {taken[0]}, but PEFT reads that name as "
                f"a part of the experts of {model.config.model_type!r}; use 'all-linear'"
            )
    experts = _experts(model, language_model, target_modules)
    if not modules and not experts:
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear layer of the language model "
            f"({language_model or 'the whole model'}); {_tip(model, language_model, ())}"
        )
    rows = {}
    if fused == "blocks":
        inside = {name for name, _ in _inside(model, language_model)}
        for name in modules:
            if name in inside and (shared := rows_of(model, name, model.get_submodule(name))):
                rows[name] = shared
    return Targets(tuple(modules), skipped, projector, rows, experts)


def _experts(
    model: nn.Module, language_model: str, target_modules: str | Sequence[str]
) -> tuple[str, ...]:
    """Return the tensors of experts that a preset means; a pattern means those of all kinds."""
    wanted = {"attention": "(?!)", "gate_up": r".*(gate|up)_proj"}.get(str(target_modules), ".*")
    return tuple(
        f"{name}.{key}"
        for name, module in _inside(model, language_model)
        if holds_experts(name, module)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and re.fullmatch(wanted, key)
    )


QUANTIZED = "a base in 4 bits"
EXPERTS_LIMIT = 100_000_000
"""Trainable parameters up to which ``experts: auto`` adapts experts."""


def choose_experts(
    model: nn.Module,
    targets: Targets,
    wanted: Literal["auto", "none", "shared", "all"],
    r: int,
    *,
    obstacle: str | None = None,
) -> tuple[tuple[str, ...], str]:
    """Choose which tensors of experts get an adapter.

    Args:
        model: The model; its weights may be absent.
        targets: From ``find_targets``.
        wanted: "all"; "shared": those that every token passes; "none"; "auto": all, if they train
            at most ``EXPERTS_LIMIT`` parameters and nothing is in the way.
        r: Rank of each expert.
        obstacle: What PEFT cannot do with such tensors and the settings ask for.

    Returns:
        Full names, and what was chosen and why, "" if the model has no such tensors.

    Raises:
        ValueError: If experts are asked for and there are none, or there is an obstacle.
    """
    if not targets.experts:
        if wanted == "all":
            raise ValueError(
                "adapter.experts=all: the layers of adapter.target_modules hold no experts in one "
                "tensor; leave it at auto"
            )
        return (), ""
    shared = tuple(name for name in targets.experts if "shared" in name)
    size = 0
    for name in targets.experts:
        count, rows, columns = layer_of(model, name).weight.shape
        size += count * r * (rows + columns)
    cost = f"all {len(targets.experts)} tensors of experts train {size:,} parameters at r={r}"
    if obstacle and wanted in ("all", "shared"):
        raise ValueError(f"adapter.experts={wanted}: {targets.experts[0]} cannot have {obstacle}")
    if wanted == "auto":
        fits = size <= EXPERTS_LIMIT and not obstacle
        reason = f"not with {obstacle}" if obstacle else f"the limit of auto is {EXPERTS_LIMIT:,}"
        if fits:
            return targets.experts, f"experts: all; {cost}"
        wanted = "none"
        cost = f"{cost}, {reason}; adapter.experts=all adapts them"
    chosen = {"all": targets.experts, "shared": shared, "none": ()}[wanted]
    if not targets.modules and not chosen:
        raise ValueError(f"no layer is left to adapt: experts: {wanted}; {cost}")
    return chosen, f"experts: {wanted}; {cost}"


def resolve_residual(
    model: nn.Module,
    modules: Sequence[str],
    wanted: Literal["auto", "subtract", "anchor"],
    has_float_weights: bool = False,
) -> Literal["subtract", "anchor"]:
    """Choose the residual mode: subtract for float32 weights, else anchor.

    Args:
        model: The base model.
        modules: Full names of the adapted layers.
        wanted: The mode asked for.
        has_float_weights: The float weights of a quantized model are at hand; "auto" subtracts from
            them, and the difference is quantized again.

    Raises:
        ValueError: If "subtract" is asked for on quantized weights without their float weights.
    """
    weights = {name: layer_of(model, name).weight for name in modules}
    quantized = [name for name, weight in weights.items() if is_quantized(weight)]
    if wanted == "subtract" and quantized and not has_float_weights:
        raise ValueError(
            f"{quantized[0]} is quantized ({type(weights[quantized[0]]).__name__}): nothing can be "
            "subtracted from packed values. Load the float checkpoint with load_vlm(path, "
            "quantization='nf4') and pass weights=vlm.float_weights, or use residual='anchor'"
        )
    if wanted != "auto":
        return wanted
    if quantized and has_float_weights:
        return "subtract"
    exact = all(weight.dtype == torch.float32 for weight in weights.values())
    return "subtract" if exact and not quantized else "anchor"


def check_layers(
    model: nn.Module,
    modules: Sequence[str],
    r: int,
    ranks: Mapping[str, int] | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> None:
    """Refuse layers that cannot be decomposed, before anything is decomposed.

    Args:
        model: The base model.
        modules: Full names of its layers.
        r: Rank.
        ranks: Full name -> rank, of layers with another one.
        rows: Full name -> blocks of rows, of layers that get the rank once a block.

    Raises:
        ValueError: Naming the layer, if its weight is not finite or too small for r.
    """
    for name in modules:
        layer = layer_of(model, name)
        if layer.weight.is_meta:
            raise ValueError(
                f"{name}: its weight is not loaded (meta device); load the model fully"
            )
        weight = layer.weight
        if is_quantized(weight):  # its values are checked when it is decomposed
            weight = torch.zeros(()).expand(layer.out_features, layer.in_features)
        blocks = rows[name].split(weight) if rows and name in rows else [weight]
        blocks = weight if weight.ndim == 3 else blocks  # experts
        try:
            for block in blocks:
                check_weight(block, (ranks or {}).get(name, r))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def match_pattern(key: str, pattern: Mapping[str, V], modules: Sequence[str]) -> dict[str, V]:
    """Return full name -> value for the layers that a pattern of ranks or alphas names.

    Args:
        key: Of the config, for messages.
        pattern: Name ending, or regular expression for one, -> value; the first that fits counts.
        modules: Full names of the adapted layers.

    Raises:
        ValueError: If an entry is no regular expression or names no adapted layer.
    """
    found: dict[str, V] = {}
    for ending, value in pattern.items():
        try:
            named = [name for name in modules if re.fullmatch(rf"(.*\.)?({ending})", name)]
        except re.error as error:
            raise ValueError(
                f"{key}: {ending!r} is no regular expression ({error}); write a name ending such "
                f"as {modules[0].rpartition('.')[2]!r}"
            ) from error
        if not named:
            endings = sorted({name.rpartition(".")[2] for name in modules})
            raise ValueError(f"{key}: {ending!r} names no adapted layer; they end in {endings}")
        found = {**dict.fromkeys(named, value), **found}
    return {name: found[name] for name in modules if name in found}


def refusal(name: str, module: nn.Module) -> str | None:
    """Return why a module cannot be decomposed as one linear map, or None if it can."""
    if type(module).__name__ == "Conv1D":
        return "its weight is stored transposed (Conv1D); convert it to nn.Linear"
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, not a linear layer"
    if name.rpartition(".")[2] == "lm_head":
        return "it is the output head"
    return None


def outside_refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Return why a module outside the language model's layers cannot be adapted, or None."""
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, not a linear layer"
    if any(part in PROJECTOR_NAMES for part in name.split(".")):
        return "the projector trains in full (train_projector)"
    embeddings = model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if name.rpartition(".")[2] == "lm_head" and (tied or module.weight is embeddings.weight):
        return "its weight is also the input embedding, which a merge would change"
    return None


def _preset(model: nn.Module, language_model: str, preset: str) -> tuple[list[str], dict[str, str]]:
    kinds, skipped, problem = _sort_layers(model, language_model)
    experts = [name for name, reason in skipped.items() if reason in _EXPERTS]
    missing = {"attention", "mlp"} - set(kinds.values())
    if not problem and missing - ({"mlp"} if experts else set()):
        others = sorted({name.rpartition(".")[2] for name in skipped})
        problem = (
            f"{type(model).__name__}: no known {' and no known '.join(sorted(missing))} projection "
            f"in {language_model or 'it'}; other linear layers are named {others}"
        )
    if problem:
        raise ValueError(
            f"{problem}, so {preset!r} does not adapt this model; "
            + _alternative(language_model, list(kinds))
        )
    modules = []
    for name, kind in kinds.items():
        if PRESETS[preset].fullmatch(f"{kind} {name.rpartition('.')[2]}"):
            modules.append(name)
        else:
            skipped[name] = f"{preset!r} leaves it out"
    return modules, skipped


def _sort_layers(
    model: nn.Module, language_model: str
) -> tuple[dict[str, str], dict[str, str], str | None]:
    """Return the kind of every known projection, why others are skipped, and what is in the way."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, module in _inside(model, language_model):
        kind = kind_of(name)
        if type(module).__name__ == "Conv1D":
            return kinds, skipped, f"{name}: {refusal(name, module)}"
        if holds_experts(name, module):
            skipped[name] = _EXPERTS[0]
        elif not isinstance(module, nn.Linear):
            continue
        elif module is head or name.rpartition(".")[2] == "lm_head":
            skipped[name] = "it is the output head"
        elif kind in _LEFT_OUT:
            skipped[name] = _LEFT_OUT[kind]
        else:
            kinds[name] = kind
    for name in _taken_for_experts(model, list(kinds)):
        skipped[name] = _EXPERTS[1]
        del kinds[name]
    return kinds, skipped, None


_EXPERTS = (
    "the experts in it are for adapter.experts to choose",
    "PEFT reads its name as a part of this model type's experts",
)
_LEFT_OUT = {
    "router": "it routes tokens to experts",
    None: "its name is no known attention or MLP projection",
}


def _taken_for_experts(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """Return the layers that PEFT would not find.

    For model types whose experts were linear layers in transformers 4, PEFT rewrites targets such
    as ``gate_proj`` to the tensor that now holds the experts, also where the layer is no expert.
    """
    config = LoraConfig(target_modules=list(modules))
    convert_peft_config_for_transformers(config, model, None)
    return [name for name in modules if name not in config.target_modules]


def _alternative(language_model: str, modules: Sequence[str]) -> str:
    names = sorted({name.rpartition(".")[2] for name in modules})
    if not names:
        return "list the layers to adapt in target_modules"
    return (
        "list the layers to adapt in target_modules, for example those that can be adapted as "
        f"they are: target_modules={_ending_in(language_model, names)!r}"
    )


def _matching(
    model: nn.Module,
    language_model: str,
    target_modules: str | Sequence[str],
    allow_outside: bool,
) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {name for name, _ in _inside(model, language_model)}
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules={target_modules!r} is no regular expression ({error}); "
                f"{_tip(model, language_model, ())}"
            ) from error
    modules, outside = [], []
    for name, module in model.named_modules():
        if not name or not _matches(name, target_modules):
            continue
        if name not in inside or module is head:
            outside.append(name)
            if allow_outside and (reason := outside_refusal(model, name, module)):
                raise ValueError(
                    f"target_modules matches {name}: {reason}; exclude it, or "
                    f"{_tip(model, language_model, target_modules)}"
                )
            if allow_outside:
                modules.append(name)
        elif reason := refusal(name, module):
            raise ValueError(
                f"target_modules matches {name}: {reason}; exclude it, or "
                f"{_tip(model, language_model, target_modules)}"
            )
        else:
            modules.append(name)
    if outside and not allow_outside:
        raise ValueError(
            f"target_modules={target_modules!r} also matches {len(outside)} modules outside the "
            f"language model, the first is {outside[0]}; only {language_model or 'decoder'} layers "
            "are adapted unless allow_outside_language_model=true; "
            f"{_tip(model, language_model, target_modules)}"
        )
    return modules


def _matches(name: str, target_modules: str | Sequence[str]) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _tip(model: nn.Module, language_model: str, target_modules: str | Sequence[str]) -> str:
    """Return advice that names a choice which ``find_targets`` accepts for this model.

    The choice covers those of the refused layers that may be adapted, else all attention layers.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    allowed = {
        name
        for name, module in _inside(model, language_model)
        if refusal(name, module) is None and module is not head
    }
    meant = [name for name in allowed if _matches(name, target_modules)]
    for names in (meant, [name for name in allowed if kind_of(name) == "attention"], allowed):
        choice = _ending_in(language_model, {name.rpartition(".")[2] for name in names})
        found = {name for name, _ in model.named_modules() if _matches(name, choice)}
        if found and found <= allowed:  # a layer of the same name may be of another kind
            return f"use, for example, target_modules={choice!r}"
    return "list full names of linear layers of the language model"


def _ending_in(language_model: str, names: Iterable[str]) -> str:
    prefix = rf"{re.escape(language_model)}\." if language_model else ""
    return rf"{prefix}.*\.({'|'.join(re.escape(name) for name in sorted(names))})"


def _inside(model: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Return the modules below ``prefix``, leaving out towers nested in it."""
    start = f"{prefix}." if prefix else ""
    outsiders = (*TOWER_NAMES, *PROJECTOR_NAMES)
    return [
        (name, module)
        for name, module in model.named_modules()
        if name
        and name.startswith(start)
        and not any(part in outsiders for part in name.split("."))
    ]
