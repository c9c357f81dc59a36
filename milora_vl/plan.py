"""What a run would adapt, train and need, before any weight is read.

The estimates come from three parts: formulas for time and memory, with one short measurement; the
size of a training batch, from the texts of the records; and the layers that the config selects.
"""

import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from milora_vl.adapter.baselines import MOMENT_BYTES
from milora_vl.adapter.experts import layer_of
from milora_vl.adapter.minor_svd import multiply, pack, uses_krylov
from milora_vl.adapter.state import PLAIN_INITS
from milora_vl.adapter.targets import (
    QUANTIZED,
    TOWER_NAMES,
    Targets,
    choose_experts,
    find_targets,
    match_pattern,
)
from milora_vl.config import (
    Config,
    DataSection,
    MiloraConfig,
    ModelSection,
    arguments_for,
    split_training,
)
from milora_vl.devices import Fit, Machine, fit_batch, parse_machine
from milora_vl.model.embedded import demo_config
from milora_vl.model.families import has_vision
from milora_vl.model.load import LoadError
from milora_vl.runtime import LayerShape, choose_precision, count_layer_shapes, resolve_device

logger = logging.getLogger(__name__)

GIB = 1024**3
LARGE = 10**9  # parameters above which nobody trains on a CPU
MACHINE_NOTE = (
    "nothing was timed: rates are of data sheets, and training is assumed to reach 0.4 of them; "
    "memory is that of the longest batch; neither was compared with a GPU yet"
)
PROBE_SIDE = 1024
PROBE_SECONDS = 0.3
NF4_BYTES = 0.516  # a weight in NF4 with its doubly quantized scales
LIBRARIES_GIB = 0.7  # resident memory of Python with torch and transformers imported
# Shares of the measured matrix-product rate, and seconds beside it: `scripts/bench/plan.py` prints
# them as measured, docs/decisions.md says what was found.
KRYLOV_EFFICIENCY = 0.65
KRYLOV_SECONDS = 0.017  # a layer of any size: many small steps besides the products
EXACT_EFFICIENCY = 0.35
CPU_TRAINING_EFFICIENCY = 0.35
ACCELERATOR_TRAINING_EFFICIENCY = 0.4  # assumed: no GPU was at hand
VALUE_SECONDS = 10e-9  # a weight: digests, certificate, copies
ANSWER_RATIO = 0.25  # largest share of answer tokens, which alone have logits
NF4_SECONDS = 22e-9  # a weight: read, W_p, quantized


Method = Literal["auto", "exact", "krylov", "none"]


def measure_flops(
    dtype: torch.dtype, device: torch.device | str = "cpu", *, packed: bool = False
) -> float:
    """Return floating-point operations per second of a square matrix product, here and now.

    ``packed``: of the product that decompositions use, see ``milora_vl.adapter.minor_svd``.

    A product of side ``PROBE_SIDE`` is repeated for ``PROBE_SECONDS``; the best time counts, to
    ignore other work on the machine.
    """
    left = torch.randn(PROBE_SIDE, PROBE_SIDE, device=device).to(dtype)
    right = pack(left) if packed else left
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        product = multiply(right, left) if packed else left @ right
        float(product[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - started)
    return 2 * PROBE_SIDE**3 / best


def decomposition_flops(shape: LayerShape, r: int, krylov: bool) -> float:
    """Return operations to start one layer, with M >= N its sides.

    Exact: 4 M N^2 + 22 N^3 for the full decomposition (Golub and Van Loan's count with both sets of
    vectors). Krylov, width w = r + max(16, r / 4), a space of d = 4 w: Gram 1.25 M N^2 (panels of
    the upper triangle), two Cholesky factors 2 N^3 / 3, six solves 24 N^2 w, and products and
    orthogonalization 4 M N d + 4 M d^2. Both: 6 M N r for products that the certificate checks.
    """
    m, n = max(shape.d_out, shape.d_in), min(shape.d_out, shape.d_in)
    checks = 6 * m * n * r
    if not krylov:
        return 4 * m * n**2 + 22 * n**3 + checks
    width = r + max(16, r // 4)
    space = 4 * width
    gram = 1.25 * m * n**2 + 2 * n**3 / 3
    return gram + 24 * n**2 * width + 4 * m * n * space + 4 * m * space**2 + checks


def init_seconds(
    shapes: list[LayerShape], r: int, method: Method, flops: float, *, quantized: bool = False
) -> float:
    """Estimate the seconds to start all layers.

    Args:
        shapes: Of the layers.
        r: Adapter rank.
        method: Of decomposition; "none": nothing is decomposed.
        flops: Operations per second of a packed float32 matrix product.
        quantized: Whether the residual is quantized afterwards.
    """
    seconds = 0.0
    for shape in shapes:
        krylov = uses_krylov(min(shape.d_out, shape.d_in), r, method)
        work = decomposition_flops(shape, r, krylov) if method != "none" else 0.0
        efficiency = KRYLOV_EFFICIENCY if krylov else EXACT_EFFICIENCY
        rest = shape.d_out * shape.d_in * (VALUE_SECONDS + NF4_SECONDS * quantized)
        if krylov and work:
            rest += KRYLOV_SECONDS
        seconds += shape.count * (work / (efficiency * flops) + rest)
    return seconds


def init_workspace_gib(shapes: list[LayerShape], r: int) -> float:
    """Estimate the largest workspace beside the model: one layer at a time, float32.

    Three copies of the weight (itself, the slice, W_p), its three short-side squares (Gram, factor,
    shifted factor) or singular vectors, and a Krylov space on both sides.
    """
    largest = 0
    for shape in shapes:
        m, n = max(shape.d_out, shape.d_in), min(shape.d_out, shape.d_in)
        largest = max(largest, 4 * (3 * m * n + 3 * n * n + 8 * r * (m + n)))
    return largest / GIB


@dataclass(frozen=True)
class TrainingLoad:
    """What one micro-batch holds.

    Attributes:
        samples: Samples in it.
        tokens: Tokens a sample, image tokens included.
        images: Images a sample, 0 to 1 or more.
        patches: Patches the tower computes for one image.
        longest: Tokens of the longest sample.
    """

    samples: int
    tokens: float
    images: float
    patches: int
    longest: float = 0.0


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters and sides that the estimates need.

    Attributes:
        language_model: Parameters of the decoder's layers (no embeddings, no head).
        tower: Parameters of the vision tower.
        total: All parameters.
        adapter: Trainable parameters of the adapter.
        frozen: Parameters of an active anchor.
        projector: Trainable parameters of the projector.
        layers: Decoder layers.
        hidden: Hidden size D.
        intermediate: MLP size I.
        heads: Attention heads.
        vocabulary: Rows of the output layer.
    """

    language_model: int
    tower: int
    total: int
    adapter: int
    frozen: int
    projector: int
    layers: int
    hidden: int
    intermediate: int
    heads: int = 0
    vocabulary: int = 0


def moment_bytes(optimizer: str) -> float:
    """Return bytes of optimizer state for a trained number, by the optimizer's name."""
    if "paged" in optimizer or optimizer in ("sgd", "adafactor"):
        return 0.0  # in host memory, none, or a row and a column of a matrix
    for name, size in (("4bit", 1.0), ("8bit", 2.0)):
        if name in optimizer:
            return size
    return 8.0  # two float32 moments


def bytes_per_weight(size: ModelSize, float_bytes: int, in_4_bits: bool) -> float:
    """Return bytes of a base weight, on average; 4 bits are for the decoder's layers alone."""
    decoder = NF4_BYTES if in_4_bits else float_bytes
    rest = size.total - size.language_model
    return (size.language_model * decoder + rest * float_bytes) / size.total


def step_flops(size: ModelSize, load: TrainingLoad, *, checkpointing: bool = False) -> float:
    """Return operations of one micro-batch, forward and backward.

    A token costs 2 operations a parameter forward and 2 backward through frozen weights (the
    gradient of the input), 6 through trained ones; attention adds 6 T D a layer (causal, both
    ways); the tower runs forward only. The output layer sees only answer tokens and is ignored.
    Gradient checkpointing runs the decoder forward once more: 2 operations a parameter.
    """
    per_token = 4 * (size.language_model + size.frozen) + 6 * size.adapter
    if checkpointing:
        per_token += 2 * (size.language_model + size.frozen + size.adapter)
    per_token += 6 * load.tokens * size.hidden * size.layers
    per_image = 2 * size.tower * load.patches + 6 * size.projector * load.patches
    return load.samples * (load.tokens * per_token + load.images * per_image)


def training_gib(
    size: ModelSize,
    load: TrainingLoad,
    weight_bytes: float,
    *,
    low: bool,
    checkpointing: bool,
    eager: bool = False,
    dropout: bool = False,
    optimizer: str = "adamw_torch",
) -> float:
    """Estimate the memory of training, host libraries not counted.

    Weights; float32 adapters, their gradients and the optimizer's state (8 bytes a trained number
    and ``moment_bytes``, 4 for the anchor); and activations: 14 D + 5 I numbers a token and layer
    (norms, projections, attention, gate and up), in the dtype of the products; with gradient
    checkpointing 1 D a layer and one layer in full. Eager attention keeps its T^2 probabilities a
    head and layer, in float32 and in the dtype of the products. Autocast keeps copies of the
    decoder's float32 weights and of the trained ones. Answer tokens, at most a quarter of all, have
    float32 logits and their gradients.

    Args:
        size: Of the model.
        load: Of one micro-batch.
        weight_bytes: Bytes of one base weight.
        low: Whether products run in 16 bits.
        checkpointing: Whether activations are computed again in the backward pass.
        eager: Whether attention is the eager one.
        dropout: Whether adapters drop some of their input: each keeps its own copy and a mask.
        optimizer: Its name in ``TrainingArguments``.
    """
    trained = size.adapter + size.projector
    # trained numbers: 4 bytes of value, 4 of gradient, and the optimizer's moments
    fixed = size.total * weight_bytes + (8 + moment_bytes(optimizer)) * trained
    fixed += 4 * size.frozen
    width = 14 * size.hidden + 5 * size.intermediate
    if dropout:
        width += 1.5 * (6 * size.hidden + size.intermediate)
    layers = size.layers * (size.hidden if checkpointing else width) + width * checkpointing
    narrow = 2 if low else 4
    activations = load.samples * load.tokens * layers * narrow
    # float32 logits and their gradients
    activations += load.samples * load.tokens * size.vocabulary * ANSWER_RATIO * 8
    if eager:
        kept = 1 if checkpointing else size.layers
        activations += load.samples * size.heads * load.tokens**2 * kept * (4 + narrow)
    if low:  # autocast keeps narrow copies
        fixed += trained * narrow
    if low and weight_bytes == 4:
        fixed += size.language_model * narrow
    return (fixed + activations) / GIB


CHARACTERS_PER_TOKEN = 4
TOKENS_PER_TURN = 5  # marks of the prompt style


def guess_load(
    data: DataSection, config: PreTrainedConfig, training: dict[str, Any]
) -> tuple[TrainingLoad, int | None, list[str]]:
    """Guess what a micro-batch holds.

    Args:
        data: Names the record files, which may be absent.
        config: Of the model.
        training: Keys of ``TrainingArguments``.

    Returns:
        The load, the number of samples (None without records), and notes for people.
    """
    vision = getattr(config, "vision_config", None)
    image_tokens = getattr(config, "image_seq_length", 0) if vision else 0
    patch = getattr(vision, "patch_size", 14)
    side = image_tokens**0.5 if image_tokens else getattr(vision, "image_size", 0) / patch
    per_device = training.get("per_device_train_batch_size", 8)
    files = [Path(name) for name in data.train]
    if not all(file.exists() for file in files):
        notes = [f"the record files do not exist: each sample counts as {data.max_length} tokens"]
        longest = data.max_length
        load = TrainingLoad(per_device, longest, float(bool(vision)), int(side**2), longest)
        return load, None, notes
    texts = [text for file in files for text in _read_texts(file)[: data.limit]]
    characters = sum(len(text) for text, _, _ in texts)
    turns, with_image = sum(n for _, n, _ in texts), sum(has for _, _, has in texts)
    mean = (characters / CHARACTERS_PER_TOKEN + TOKENS_PER_TURN * turns) / max(len(texts), 1)
    mean += image_tokens * with_image / max(len(texts), 1)
    tokens = min(mean, data.max_length)
    longest = max(
        (
            len(text) / CHARACTERS_PER_TOKEN + TOKENS_PER_TURN * turns + image_tokens * has
            for text, turns, has in texts
        ),
        default=mean,
    )
    notes = [
        f"{len(texts):,} samples of about {tokens:.0f} tokens ({CHARACTERS_PER_TOKEN} characters a "
        "token); seconds and memory are good to about a factor of two, for one process"
    ]
    images_each = with_image / max(len(texts), 1)
    longest = min(longest, data.max_length)
    load = TrainingLoad(per_device, tokens, images_each, int(side**2), longest)
    return load, len(texts), notes


def _read_texts(file: Path) -> list[tuple[str, int, bool]]:
    """Return all text, the number of turns and whether there is an image, for every record."""
    content = file.read_text(encoding="utf-8")
    is_list = content.lstrip().startswith("[")
    lines = [] if is_list else content.splitlines()
    records = json.loads(content) if is_list else [json.loads(x) for x in lines if x.strip()]
    found = []
    for record in records:
        turns = record.get("conversations") or record.get("messages") or []
        text = "".join(str(turn.get("value") or turn.get("content") or "") for turn in turns)
        found.append((text, len(turns), bool(record.get("image") or record.get("images"))))
    return found


def count_steps(training: dict[str, Any], samples: int | None, batch: int) -> int | None:
    """Return the optimizer steps of one process, or None if the number of samples is unknown."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    if samples is None:
        return None
    return int(-(-samples // batch) * training.get("num_train_epochs", 3))


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
    shape: LayerShape
    parameters: int


@dataclass(frozen=True)
class Plan:
    """The plan of a run; estimates are good to about a factor of two.

    Attributes:
        groups: Layers that get adapters.
        skipped: Full name -> reason, for layers of the language model without an adapter.
        r: Adapter rank.
        init: Method.
        residual: "subtract" or "anchor".
        projector: Full name of the projector and its parameters, if it trains.
        trainable: Trainable parameters.
        total: Parameters of the base model.
        gflops: Rate of matrix products, measured or of the named device: of decompositions, and in
            the dtype of training; None: unknown.
        init_seconds: To start the adapters; None without a rate.
        init_gib: Memory while starting.
        steps: Optimizer steps.
        step_seconds: Of one optimizer step; None without a rate.
        training_gib: Memory while training, of one device.
        device: Where that is.
        fit: What fits on a named device.
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
    gflops: tuple[float, float] | None
    init_seconds: float | None
    init_gib: float
    steps: int | None
    step_seconds: float | None
    training_gib: float
    notes: tuple[str, ...]
    device: str = "here"
    fit: Fit | None = None

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
            lines.append(f"skipped: {count} layers, because {reason}")
        share = 100 * self.trainable / self.total
        lines.append(f"trainable {self.trainable:,} of {self.total:,} ({share:.2f} %)")
        lines += self._costs()
        return "\n".join([*lines, *(f"note: {text}" for text in self.notes)])

    def _costs(self) -> list[str]:
        """Return the lines on rates, start, training and what fits."""
        lines, start, step = [], "", ""
        if self.gflops:
            lines.append(
                f"matrix products {self.device}: {self.gflops[0]:.0f} GFLOP/s as decomposed "
                f"(float32), {self.gflops[1]:.0f} as trained"
            )
        if self.init_seconds is not None:
            start = f"about {_duration(self.init_seconds)}, "
        if self.step_seconds is not None:
            step = f"about {self.step_seconds:.2g} s a step"
            if self.steps:
                whole = _duration(self.steps * self.step_seconds)
                step += f", {whole} for {self.steps:,} steps"
            step += ", "
        lines.append(f"start: {start}{self.init_gib:.1f} GiB")
        lines.append(f"training: {step}{self.training_gib:.1f} GiB")
        return lines + (self.fit.lines() if self.fit else [])


def plan_run(config: Config, device: str | None = None) -> Plan:
    """Plan a run from its config; no weight file is opened.

    The model is built without memory (meta device). Seconds come from operation counts, see
    ``milora_vl.plan``, and a rate: that of ``device``, or of a matrix product timed on this
    machine. A model that wants a GPU where there is none is not timed.

    Args:
        config: The settings.
        device: Where the run will go, as ``milora_vl.devices.parse_machine`` reads it; None: here.

    Raises:
        milora_vl.model.load.LoadError: If the model's config cannot be found.
        ValueError: If ``target_modules`` reaches something that may not be adapted, r is too
            large for a layer, or ``device`` is unknown.
    """
    machine = parse_machine(device) if device else None
    model, adapter = empty_model(config.model), config.adapter
    training = arguments_for(config.training, machine.count if machine else 1)
    targets, choice = plan_targets(model, adapter, quantized=bool(config.model.quantization))
    groups = group_layers(model, targets, adapter)
    shapes = [group.shape for group in groups]
    dtype = config.model.dtype
    weights = getattr(torch, dtype) if dtype != "auto" else model.config.dtype or torch.float32
    stored = getattr(model.config, "quantization_config", None) is not None
    residual = _residual(adapter, weights, config.model.quantization, stored)
    size = _size(model, targets, adapter, groups, residual)
    load, samples, notes = guess_load(config.data, model.config, training)
    rates, low, more = _rates(model, config.model, training, weights, machine)
    notes += [*more, *([choice] if choice else [])]
    start_gib = init_workspace_gib(shapes, adapter.r)
    weight_bytes = bytes_per_weight(
        size, weights.itemsize, bool(config.model.quantization or stored)
    )
    start_gib += (size.total * weight_bytes + 4 * (size.adapter + size.frozen)) / GIB
    if adapter.init == "null_space":
        moments = sum(4 * shape.count * shape.d_in**2 for shape in shapes)
        start_gib += min(moments, MOMENT_BYTES) / GIB
        notes.append(
            f"null_space also runs {adapter.calibration_batches} batches forward before it starts"
        )
    checkpointing = bool(training.get("gradient_checkpointing"))
    work = step_flops(size, load, checkpointing=checkpointing)
    micro_step = rates and work / (rates[2] * rates[1])
    libraries = 0.0 if machine else LIBRARIES_GIB
    if machine:  # the longest batch decides whether it fits
        load = replace(load, tokens=load.longest)
    in_4_bits = bytes_per_weight(size, weights.itemsize, in_4_bits=True)
    eager = config.model.attn_implementation == "eager"

    def gib(batch: int, changes: tuple[str, ...] = ()) -> float:
        """Return a device's memory for a batch with some of ``REMEDIES`` applied."""
        four = "model.quantization=nf4" in changes
        return training_gib(
            replace(size, frozen=0) if four else size,
            replace(load, samples=batch),
            in_4_bits if four else weight_bytes,
            low=low,
            checkpointing=checkpointing or "training.gradient_checkpointing=true" in changes,
            eager=eager,
            dropout=adapter.lora_dropout > 0,
            optimizer="adamw_8bit"
            if "training.optim=adamw_8bit" in changes
            else training.get("optim", "adamw_torch"),
        )

    accumulated = training.get("gradient_accumulation_steps", 1)
    devices = machine.count if machine else 1
    global_batch = devices * load.samples * accumulated
    wanted = split_training(config.training)[0].global_batch_size or global_batch
    return Plan(
        groups=groups,
        skipped=targets.skipped,
        r=adapter.r,
        init=adapter.init,
        residual=residual,
        projector=(targets.projector, size.projector) if size.projector else None,
        trainable=size.adapter + size.projector,
        total=size.total,
        gflops=(rates[0] / 1e9, rates[1] / 1e9) if rates else None,
        init_seconds=rates
        and init_seconds(
            shapes,
            adapter.r,
            _method(adapter),
            rates[0],
            quantized=bool(config.model.quantization) and residual == "subtract",
        ),
        init_gib=start_gib + libraries,
        steps=count_steps(training, samples, global_batch),
        step_seconds=micro_step and accumulated * micro_step,
        training_gib=gib(load.samples) + libraries,
        notes=tuple(notes),
        device=f"on {machine.count} x {machine.name}" if machine else "here",
        fit=fit_batch(machine, load.samples, wanted, gib) if machine else None,
    )


def _rates(
    model: PreTrainedModel,
    section: ModelSection,
    training: dict[str, Any],
    weights: torch.dtype,
    machine: Machine | None,
) -> tuple[tuple[float, float, float] | None, bool, list[str]]:
    """Return (rate of decompositions, rate of training, share reached), 16-bit products?, notes."""
    low = bool(training.get("fp16")) or weights != torch.float32
    bf16, gpu = training.get("bf16", False), machine and machine.gpu
    if gpu:
        low, notes = low or bool(bf16), [MACHINE_NOTE]
        if not gpu.bf16 and (bf16 is True or weights == torch.bfloat16):
            notes.append(
                f"{machine.name} does not compute in bfloat16: training.bf16=false "
                "training.fp16=true model.dtype=float16"
            )
        if gpu.tflops is None or gpu.float32_tflops is None:
            return None, low, [*notes, "give a GPU's name instead of its memory for seconds"]
        trained = gpu.tflops if low else gpu.float32_tflops
        rates = (1e12 * gpu.float32_tflops, 1e12 * trained, ACCELERATOR_TRAINING_EFFICIENCY)
        return rates, low, notes
    device = resolve_device(section.device)
    if device.type == "cpu" and section.device == "auto" and count(model) > LARGE:
        note = "no GPU here, so nothing is timed; name the machine that will train: --device 8xH100"
        return None, low or bool(bf16), [note]
    if not low:
        low = choose_precision(bf16, lambda: count_layer_shapes(model), device).bf16
    flops = measure_flops(torch.float32, device, packed=True)
    trained = measure_flops(torch.bfloat16 if low else torch.float32, device)
    on_cpu = device.type == "cpu"
    share = CPU_TRAINING_EFFICIENCY if on_cpu else ACCELERATOR_TRAINING_EFFICIENCY
    return (flops, trained, share), low, []


def known_shape(path: str) -> PreTrainedConfig | None:
    """Return the shape of a published 7B model that a path names, for a plan without its files."""
    name = Path(path).name.lower()
    if "llava-1.5-7b" in name:
        return LlavaConfig()  # transformers' defaults are its sides
    return LlamaConfig() if "llama-2-7b" in name or "vicuna-7b" in name else None


def empty_model(section: ModelSection, *, only_here: bool = False) -> PreTrainedModel:
    """Build the model that a config names on the meta device: names and shapes, no values.

    Args:
        section: Names it.
        only_here: Ask no hub.

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
                local_files_only=only_here,
            )
        except (OSError, ValueError) as error:
            config = known_shape(section.path)
            if config is None:
                raise LoadError(
                    f"{section.path}: no config.json, neither in a folder here nor on the hub. A "
                    "plan needs that one file: without a network connection, download it elsewhere "
                    "and set model.path to its folder. "
                    f"{str(error).strip().splitlines()[0]}"
                ) from error
            logger.warning("%s does not exist: planned by its name, as a 7B model", section.path)
    auto = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
    with init_empty_weights():
        model = auto.from_config(config, trust_remote_code=section.trust_remote_code)
    model.tie_weights()  # shared weights count once
    return model


def plan_targets(
    model: PreTrainedModel, adapter: MiloraConfig, *, quantized: bool = False
) -> tuple[Targets, str]:
    """Return what a start would adapt, experts included, and what is said of experts.

    Args:
        model: On the meta device or not.
        adapter: Its layers and ranks.
        quantized: Whether the base will be quantized while it is read.

    Raises:
        ValueError: If a layer or an expert that is asked for may not be adapted.
    """
    targets = find_targets(
        model,
        adapter.target_modules,
        allow_outside=adapter.allow_outside_language_model,
        fused=adapter.fused_rows,
    )
    obstacle = adapter.experts_obstacle or (QUANTIZED if quantized else None)
    experts, choice = choose_experts(model, targets, adapter.experts, adapter.r, obstacle=obstacle)
    return replace(targets, modules=(*targets.modules, *experts)), choice


def group_layers(model: nn.Module, targets: Targets, adapter: MiloraConfig) -> tuple[Group, ...]:
    """Count the adapted layers by part, name and shape.

    Raises:
        ValueError: If a rank is too large for a layer, or a pattern of ranks names none.
    """
    counted: Counter[tuple[str, str, int, int, int]] = Counter()
    ranks = match_pattern("rank_pattern", adapter.rank_pattern, targets.modules)
    for name in targets.modules:
        layer, parts = layer_of(model, name), name.split(".")
        each = layer.weight.shape[0] if name in targets.experts else 1
        rows, r = targets.rows.get(name), ranks.get(name, adapter.r)
        narrowest = rows.groups * min(rows.sizes) if rows else layer.out_features
        if r > min(layer.in_features, narrowest):
            raise ValueError(
                f"{name}: r={r} is out of range for shape ({narrowest}, {layer.in_features}); use "
                f"1 to {min(layer.in_features, narrowest)}"
            )
        rank = r * (rows.count if rows else 1)
        is_tower = any(part in TOWER_NAMES for part in parts)
        part = "output head" if parts[-1] == "lm_head" else "language model"
        key = ("vision tower" if is_tower else part, parts[-1])
        counted[(*key, layer.out_features, layer.in_features, rank)] += each
    groups = []
    for (part, kind, d_out, d_in, rank), count in counted.items():
        each = rank * (d_in if adapter.init == "mica" else d_out + d_in)
        each += d_out if adapter.init == "dora" else 0
        groups.append(Group(part, kind, LayerShape(d_out, d_in, count), count * each))
    return tuple(groups)


def _residual(
    adapter: MiloraConfig, weights: torch.dtype, quantization: str | None, stored: bool
) -> str:
    """Return the residual mode; ``stored``: the checkpoint itself is quantized."""
    if adapter.init in PLAIN_INITS:
        return "anchor"
    if adapter.residual != "auto":
        return adapter.residual
    if quantization or stored:
        return "anchor" if stored else "subtract"
    return "subtract" if weights == torch.float32 else "anchor"


def _method(adapter: MiloraConfig) -> Method:
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
) -> ModelSize:
    text = model.config.get_text_config()
    decoder = model.get_decoder()
    embeddings = count(model.get_input_embeddings())
    towers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in TOWER_NAMES]
    trained = sum(group.parameters for group in groups)
    has_anchor = residual == "anchor" and adapter.init not in PLAIN_INITS
    with_projector = targets.projector and adapter.train_projector
    return ModelSize(
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
        vocabulary=text.vocab_size,
    )


def count(module: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
