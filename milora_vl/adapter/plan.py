"""What a run would adapt, train, take and need, before any weight is read."""

from collections import Counter
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from milora_vl.adapter import cost
from milora_vl.adapter.batch_guess import count_steps, guess_load
from milora_vl.adapter.null_space import MOMENT_BYTES
from milora_vl.adapter.state import PLAIN_INITS
from milora_vl.adapter.targets import TOWER_NAMES, Targets, find_targets
from milora_vl.config import Config, MiloraConfig, ModelSection
from milora_vl.model.embedded import demo_config
from milora_vl.model.families import has_vision
from milora_vl.model.load import LoadError, resolve_device


@dataclass(frozen=True)
class Group:
    """Layers of one kind that get an adapter.

    Attributes:
        part: "language model", "vision tower" or "output head".
        kind: Last name of the layers, for example "q_proj".
        shape: How large, and how many.
        parameters: Trainable numbers of all their adapters.
    """

    part: str
    kind: str
    shape: cost.Shape
    parameters: int


@dataclass(frozen=True)
class Plan:
    """The plan of a run; estimates are good to about a factor of two.

    Attributes:
        groups: Layers that get adapters.
        skipped: Full name -> reason, for layers of the language model left out.
        r: Adapter rank.
        init: Method.
        residual: "subtract" or "anchor".
        projector: Full name of the projector and its parameters, if it trains.
        trainable: Trainable parameters.
        total: Parameters of the base model.
        gflops: Measured rate of matrix products: of decompositions, and in the dtype of training.
        init_seconds: To start the adapters.
        init_gib: Memory while starting.
        steps: Optimiser steps.
        step_seconds: Of one optimiser step.
        training_gib: Memory while training.
        notes: What the estimates assume.
    """

    groups: tuple[Group, ...]
    skipped: dict[str, str]
    r: int
    init: str
    residual: str
    projector: tuple[str, int] | None
    trainable: int
    total: int
    gflops: tuple[float, float]
    init_seconds: float
    init_gib: float
    steps: int | None
    step_seconds: float
    training_gib: float
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Return the table and the totals."""
        lines = [
            f"init={self.init} r={self.r} residual={self.residual}",
            f"{'part':<16}{'layers':<12}{'n':>5}  {'d_out x d_in':>15}  {'trainable':>13}",
        ]
        for group in self.groups:
            shape = f"{group.shape.d_out} x {group.shape.d_in}"
            lines.append(
                f"{group.part:<16}{group.kind:<12}{group.shape.count:>5}  {shape:>15}  "
                f"{group.parameters:>13,}"
            )
        if self.projector:
            name, parameters = self.projector
            kind = name.rpartition(".")[2]
            lines.append(f"{'projector':<16}{kind:<34}  {parameters:>13,}  (in full)")
        for reason, count in Counter(self.skipped.values()).items():
            lines.append(f"left out: {count} layers, because {reason}")
        share = 100 * self.trainable / self.total
        lines += [
            f"trainable {self.trainable:,} of {self.total:,} ({share:.2f} %)",
            f"matrix products here: {self.gflops[0]:.0f} GFLOP/s as decomposed (float32), "
            f"{self.gflops[1]:.0f} as trained",
            f"start: about {_duration(self.init_seconds)}, {self.init_gib:.1f} GiB",
        ]
        whole = ""
        if self.steps:
            whole = f", {_duration(self.steps * self.step_seconds)} for {self.steps:,} steps"
        lines.append(
            f"training: about {self.step_seconds:.2g} s a step{whole}, {self.training_gib:.1f} GiB"
        )
        return "\n".join([*lines, *(f"note: {text}" for text in self.notes)])


def plan_run(config: Config) -> Plan:
    """Plan a run from its config; no weight file is opened.

    The model is built without memory (meta device). Seconds come from operation counts, see
    ``milora_vl.adapter.cost``, and a matrix product timed on this machine.

    Raises:
        milora_vl.model.load.LoadError: If the model's config cannot be found.
        ValueError: If ``target_modules`` reaches something that may not be adapted, or r is too
            large for a layer.
    """
    model = empty_model(config.model)
    adapter, training = config.adapter, config.training
    targets = find_targets(
        model, adapter.target_modules, allow_outside=adapter.allow_outside_language_model
    )
    groups = _groups(model, targets, adapter)
    shapes = [group.shape for group in groups]
    dtype = config.model.dtype
    weights = getattr(torch, dtype) if dtype != "auto" else model.config.dtype or torch.float32
    stored = getattr(model.config, "quantization_config", None) is not None
    residual = _residual(adapter, weights, config.model.quantization, stored)
    size = _size(model, targets, adapter, groups, residual)
    load, samples, notes = guess_load(config.data, model.config, training)
    low = bool(training.get("bf16") or training.get("fp16")) or weights != torch.float32
    device = resolve_device(config.model.device)
    flops = cost.measure_flops(torch.float32, device, packed=True)
    trained_flops = cost.measure_flops(torch.bfloat16 if low else torch.float32, device)
    accumulated = training.get("gradient_accumulation_steps", 1)
    on_cpu = device.type == "cpu"
    share = cost.CPU_TRAINING_EFFICIENCY if on_cpu else cost.ACCELERATOR_TRAINING_EFFICIENCY
    micro_step = cost.step_flops(size, load) / (share * trained_flops)
    start_gib = cost.init_workspace_gib(shapes, adapter.r) + cost.LIBRARIES_GIB
    in_4_bits = bool(config.model.quantization) or stored
    weight_bytes = cost.bytes_per_weight(size, weights.itemsize, in_4_bits)
    start_gib += (size.total * weight_bytes + 4 * (size.adapter + size.frozen)) / cost.GIB
    if adapter.init == "null_space":
        moments = sum(4 * shape.count * shape.d_in**2 for shape in shapes)
        start_gib += min(moments, MOMENT_BYTES) / cost.GIB
        notes.append(
            f"null_space also runs {adapter.calibration_batches} batches forward before it starts"
        )
    return Plan(
        groups=groups,
        skipped=targets.skipped,
        r=adapter.r,
        init=adapter.init,
        residual=residual,
        projector=(targets.projector, size.projector) if size.projector else None,
        trainable=size.adapter + size.projector,
        total=size.total,
        gflops=(flops / 1e9, trained_flops / 1e9),
        init_seconds=cost.init_seconds(
            shapes,
            adapter.r,
            _method(adapter),
            flops,
            quantised=bool(config.model.quantization) and residual == "subtract",
        ),
        init_gib=start_gib,
        steps=count_steps(training, samples, load.samples * accumulated),
        step_seconds=accumulated * micro_step,
        training_gib=cost.training_gib(
            size,
            load,
            weight_bytes,
            low=low,
            checkpointing=bool(training.get("gradient_checkpointing")),
            eager=config.model.attn_implementation == "eager",
        ),
        notes=tuple(notes),
    )


def empty_model(section: ModelSection) -> PreTrainedModel:
    """Build the model that a config names on the meta device: names and shapes, no values.

    Raises:
        milora_vl.model.load.LoadError: If its ``config.json`` cannot be found.
    """
    if section.path == "demo":
        config = demo_config(section.image_size_px, section.vision_feature_layer)
    else:
        try:
            config = AutoConfig.from_pretrained(
                section.path,
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise LoadError(
                f"{section.path}: no config.json, neither in a folder here nor on the hub. A plan "
                "needs that one file: without a network connection, download it elsewhere and set "
                f"model.path to its folder. {str(error).strip().splitlines()[0]}"
            ) from error
    sees = has_vision(config)
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with init_empty_weights():
        model = auto.from_config(config, trust_remote_code=section.trust_remote_code)
    model.tie_weights()  # shared weights count once
    return model


def _groups(model: nn.Module, targets: Targets, adapter: MiloraConfig) -> tuple[Group, ...]:
    counted: Counter[tuple[str, str, int, int]] = Counter()
    for name in targets.modules:
        layer, parts = model.get_submodule(name), name.split(".")
        if adapter.r > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"{name}: r={adapter.r} is out of range for shape "
                f"({layer.out_features}, {layer.in_features}); use 1 to "
                f"{min(layer.in_features, layer.out_features)}"
            )
        is_tower = any(part in TOWER_NAMES for part in parts)
        part = "output head" if parts[-1] == "lm_head" else "language model"
        key = ("vision tower" if is_tower else part, parts[-1])
        counted[(*key, layer.out_features, layer.in_features)] += 1
    groups = []
    for (part, kind, d_out, d_in), count in counted.items():
        each = adapter.r * (d_in if adapter.init == "mica" else d_out + d_in)
        each += d_out if adapter.init == "dora" else 0
        groups.append(Group(part, kind, cost.Shape(d_out, d_in, count), count * each))
    return tuple(groups)


def _residual(
    adapter: MiloraConfig, weights: torch.dtype, quantization: str | None, stored: bool
) -> str:
    """Return the residual mode; ``stored``: the checkpoint itself is quantised."""
    if adapter.init in PLAIN_INITS:
        return "anchor"
    if adapter.residual != "auto":
        return adapter.residual
    if quantization or stored:
        return "anchor" if stored else "subtract"
    return "subtract" if weights == torch.float32 else "anchor"


def _method(adapter: MiloraConfig) -> cost.Method:
    if adapter.init in ("lora", "rslora", "dora"):
        return "none"
    if adapter.spectrum == "minor":
        return adapter.svd
    return "exact"


def _size(
    model: PreTrainedModel,
    targets: Targets,
    adapter: MiloraConfig,
    groups: tuple[Group, ...],
    residual: str,
) -> cost.ModelSize:
    text = model.config.get_text_config()
    decoder = model.get_decoder()
    embeddings = count(model.get_input_embeddings())
    towers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in TOWER_NAMES]
    trained = sum(group.parameters for group in groups)
    has_anchor = residual == "anchor" and adapter.init not in PLAIN_INITS
    with_projector = targets.projector and adapter.train_projector
    return cost.ModelSize(
        language_model=count(decoder) - embeddings,
        tower=count(towers[0]) if towers else 0,
        total=count(model),
        adapter=trained,
        frozen=trained if has_anchor else 0,
        projector=count(model.get_submodule(targets.projector)) if with_projector else 0,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
    )


def count(module: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
