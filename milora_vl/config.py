"""A run's settings: typed sections, read from YAML plus ``section.key=value`` overrides."""

import dataclasses
import difflib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from milora_vl.errors import MiloraError
from milora_vl.files import cache_folder, write_text_atomic
from milora_vl.runtime import BF16_CHOICES

logger = logging.getLogger(__name__)


class ConfigError(MiloraError, ValueError):
    """A configuration that cannot be used; the text says where and what to write instead."""


class Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; refuse repeated keys, of which YAML keeps the last."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: key written twice: {sorted(twice)}"
            )
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3, without a dot, as text
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in nested plain values; the value is YAML.

    Raises:
        ConfigError: If the words cannot be read or a section is a value.
    """
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"override {override!r}: write section.key=value")
    *sections, key = name.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        values = inner
    try:
        values[key] = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {error}") from error


def expand_cache(value: Any) -> Any:
    """Return ``value`` with ``${MILORA_CACHE}`` replaced in all its texts."""
    if isinstance(value, str):
        return value.replace("${MILORA_CACHE}", str(cache_folder()))
    if isinstance(value, Mapping):
        return {key: expand_cache(inner) for key, inner in value.items()}
    return [expand_cache(inner) for inner in value] if isinstance(value, list) else value


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint: the known name nearest to ``name``, or ``otherwise`` when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else otherwise


Slice = Literal["minor", "principal", "middle", "random"]
SvdMethod = Literal["auto", "exact", "krylov"]
Residual = Literal["auto", "subtract", "anchor"]
Init = Literal[
    "milora", "pissa", "slice:middle", "slice:random",
    "lora", "rslora", "dora", "olora", "mica", "null_space",
]  # fmt: skip
INIT_SLICES: dict[str, Slice] = {
    "pissa": "principal",
    "slice:middle": "middle",
    "slice:random": "random",
}
Correction = Literal["none", "low_rank"]


class Section(BaseModel):
    """Base of all sections: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MiloraConfig(Section):
    """How to build a MiLoRA adapter.

    Attributes:
        r: Adapter rank, at most the smaller side of every adapted weight.
        lora_alpha: The scaling is lora_alpha / r; None means r, as in the paper.
        rank_pattern: Name ending or regular expression for it -> r of those layers, as in PEFT.
        alpha_pattern: The same for lora_alpha.
        fused: A layer that holds several projections by rows (``qkv_proj``, ``gate_up_proj``,
            ``in_proj_qkv``): "blocks" starts each projection in its own slice, with r directions
            each; "whole" starts in the slice of the whole matrix. See
            ``milora_vl.adapter.fused``.
        experts: Experts whose weights are kept in one tensor (Qwen3-VL-MoE, Llama 4, Gemma 4 MoE):
            "all", each at rank r; "shared", those that every token passes; "none"; "auto": all if
            they train at most 100 million parameters, else none. PEFT has no dropout and no DoRA
            there. Experts in linear layers of their own are layers like others.
        init: Method that gives the first values: "milora"; "pissa", "slice:middle" and
            "slice:random" (other parts of the spectrum); PEFT's "lora", "rslora", "dora", "olora"
            and "mica"; "null_space" (see ``milora_vl.adapter.baselines``).
        slice: With init "milora", where in the spectrum to start: minor (MiLoRA), principal
            (PiSSA), middle, random.
        residual: "subtract" writes W_p into the base weights; "anchor" keeps them and subtracts
            with a frozen second adapter; "auto" subtracts in float32 and NF4, else anchors.
        svd: Decomposition method, see ``milora_vl.adapter.minor_svd``.
        target_modules: "all-linear" (attention and MLP of the language model), "attention", "mlp",
            "gate_up", a regular expression for full names, or a list of names or name endings. It
            matters more than ``init``: a study of vision-language models (arXiv:2510.08564) found
            that attention alone learns 24.9 points of a new task and forgets 0.6 of others, the
            whole language model 31.8 and 23.3.
        lora_dropout: Dropout before lora_A of the trainable adapter, not of the anchor: at step 0
            the layer equals the pretrained one in eval mode, and on average in train mode.
        train_projector: Train the vision-language projector in full.
        calibration_batches: With init "null_space", how many training batches are measured.
        allow_outside_language_model: Let ``target_modules`` reach the vision tower and an output
            head with separate weights; otherwise such a pattern is refused.
        factor_cache: Keep the factors below ``$MILORA_CACHE/factors`` for the next start.
        quantization_correction: How the quantization error of NF4 is corrected, see
            ``milora_vl.adapter.nf4``.
        scale: "singular" starts from U diag(S) Vh of the slice, as published; "none" from U Vh, so
            from orthonormal factors. Step 0 is the base either way. Orthonormal starts are reported
            to be steadier in reinforcement learning (arXiv:2606.31813).
        decay_to_start: Decoupled weight decay of the factors toward their start; 0 for none.
            ``training.weight_decay`` goes toward zero instead, and removes with the factors the
            part of the pretrained weights that they began with.
    """

    r: int = Field(default=128, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    fused: Literal["blocks", "whole"] = "blocks"
    experts: Literal["auto", "none", "shared", "all"] = "auto"
    init: Init = "milora"
    slice: Slice = "minor"
    residual: Residual = "auto"
    svd: SvdMethod = "auto"
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    train_projector: bool = True
    calibration_batches: int = Field(default=8, ge=1)
    allow_outside_language_model: bool = False
    factor_cache: bool = True
    quantization_correction: Correction = "none"
    scale: Literal["singular", "none"] = "singular"
    decay_to_start: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @field_validator("target_modules")
    @classmethod
    def _can_match(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("no layer is named; use all-linear, attention or mlp")
        if isinstance(value, str):  # a list holds names, not expressions
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"{value!r} is no regular expression: {error}; use all-linear, attention or mlp"
                ) from error
        return value

    @model_validator(mode="after")
    def _decay_has_a_start(self) -> "MiloraConfig":
        if self.decay_to_start and self.init in ("lora", "rslora", "dora", "mica"):
            raise ValueError(
                f"decay_to_start: with init={self.init} the update starts at zero, so plain weight "
                "decay is the same; use training.weight_decay"
            )
        return self

    @model_validator(mode="after")
    def _scale_has_a_spectrum(self) -> "MiloraConfig":
        if self.scale == "none" and self.spectrum is None:
            raise ValueError(
                f"scale: none leaves the singular values out, and init={self.init} takes none; "
                "remove the key"
            )
        return self

    @model_validator(mode="after")
    def _slice_fits_init(self) -> "MiloraConfig":
        if self.init != "milora" and self.slice not in ("minor", self.spectrum):
            raise ValueError(
                f"slice={self.slice} contradicts init={self.init}; remove one of the two keys"
            )
        return self

    @property
    def spectrum(self) -> Slice | None:
        """The slice the adapter starts from; None for methods that start from no slice."""
        return self.slice if self.init == "milora" else INIT_SLICES.get(self.init)

    @property
    def experts_obstacle(self) -> str | None:
        """What keeps experts in one tensor from getting an adapter, or None."""
        if self.lora_dropout:
            return f"dropout (lora_dropout={self.lora_dropout:g}; set it to 0)"
        return None if self.spectrum else f"init={self.init}, which starts from no slice"

    @property
    def fused_rows(self) -> Literal["blocks", "whole"]:
        """``fused`` where the method takes a slice of the spectrum; the others take no blocks."""
        return self.fused if self.spectrum else "whole"

    @property
    def scaling(self) -> float:
        """Factor before B A: lora_alpha / r, or lora_alpha / sqrt(r) with init "rslora"."""
        r = self.r**0.5 if self.init == "rslora" else self.r
        return (self.lora_alpha or self.r) / r


class ModelSection(Section):
    """Which model, and how it is loaded.

    Attributes:
        path: Hub id, folder, or "demo" for the embedded small model.
        prepare: Command that makes the folder ``path``, run if the folder does not exist.
        revision: Hub revision (branch, tag or commit).
        dtype: Weights' dtype in memory; "auto" keeps the checkpoint's.
        quantization: "nf4" quantizes the language model's linears while they are read.
        device: "auto" takes CUDA when there is one.
        attn_implementation: Passed to transformers: "sdpa", "flash_attention_2", "eager".
        prompt_style: A name in ``milora_vl.data.prompts.PROMPT_STYLES``, or "chat_template".
        prompt_day: Day (2031-02-03) for a chat template that writes the date; None: the day on
            which the run began.
        trust_remote_code: Run code that comes with the checkpoint. Off unless you ask for it.
        allow_pickle: Also read weights that are not safetensors; pickles can run code.
        image_size_px: "demo" only: side of the image the tower sees, a multiple of 14.
        vision_feature_layer: "demo" only: hidden state(s) of the tower that feed the projector.
    """

    path: str
    prepare: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4"] | None = None
    device: str = "auto"
    attn_implementation: str | None = None
    prompt_style: str
    prompt_day: date | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    image_size_px: int = Field(default=112, ge=14)
    vision_feature_layer: int | list[int] = 9


class DataSection(Section):
    """Records to train and validate on.

    Attributes:
        train: Files of records, see docs/data.md; ``${MILORA_CACHE}`` is the cache folder.
        prepare: Command that makes the files, run first and in the repository's folder; it must
            return at once if they exist. None: they exist.
        image_folder: Folder that the records' image paths start from; empty for text-only records.
        validation: File of records for the validation loss; None for none.
        max_length: Longest sequence in tokens; answers are cut to fit, image tokens never.
        turns: "running": a record is one conversation, as in LLaVA. "side_by_side": every exchange
            is learned as if it were the only one, so that no answer gives away another.
        pad_to_square: Keep the aspect ratio by padding with the processor's mean color.
        on_bad_record: Stop at a record that cannot be used, or skip and count it.
        on_bad_image: Stop at an image that cannot be read, or skip and count its record.
        ignore_keys: Keys of records to ignore, even if docs/data.md says otherwise.
        special_tokens_in_answers: What a special token's name in an answer means: "literal", its
            characters; "token", the token, unless it stands for an image.
        video_frames: Frames shown of a video, spread evenly; with ``video_fps`` the most.
        video_fps: Frames shown for each second of a video; None: ``video_frames`` of any.
        limit, validation_limit: Use only the first records of each file.
    """

    train: list[str] = Field(min_length=1)
    prepare: str | None = None
    image_folder: str = ""
    validation: str | None = None
    max_length: int = Field(default=2048, ge=8)
    turns: Literal["running", "side_by_side"] = "running"
    pad_to_square: bool = True
    on_bad_record: Literal["error", "skip"] = "error"
    on_bad_image: Literal["error", "skip"] = "error"
    ignore_keys: list[str] = []
    special_tokens_in_answers: Literal["literal", "token"] = "literal"
    video_frames: int = Field(default=8, ge=1, le=4096)
    video_fps: float | None = Field(default=None, gt=0)
    limit: int | None = Field(default=None, ge=1)
    validation_limit: int | None = Field(default=None, ge=1)

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class AlignmentSection(Section):
    """Stage 1: the projector alone, before any adapter. Its result is cached as the base model.

    Attributes:
        train: Files of records of this stage, one caption an image; empty: those of ``data``.
        prompt_style: Style of this stage, for example "plain"; None: the model's.
        patch_steps: Steps of patch alignment, which comes first; needs "objects" in the records.
        patch_learning_rate: Its learning rate.
        patch_pictures: How many images it looks at.
        training: Keys of ``transformers.TrainingArguments`` for the stage.
    """

    train: list[str] = []
    prompt_style: str | None = None
    patch_steps: int = Field(default=0, ge=0)
    patch_learning_rate: float = Field(default=1e-3, gt=0)
    patch_pictures: int = Field(default=2000, ge=1)
    training: dict[str, Any] = {}


class ProjectorSection(Section):
    """The projector's own peak learning rate; None takes ``training.learning_rate``."""

    learning_rate: float | None = Field(default=None, gt=0)


class EvalSection(Section):
    """Benchmarks before and after training.

    Attributes:
        benches: Names as in ``python -m milora_vl.eval --bench``; empty for none.
        data_dir: Folder that holds the benches' files.
        batch_size: Prompts in one forward pass.
        blind: Also answer without the image.
        limit: Only the first questions of each bench.
        every_steps: Also run the benches every so many training steps; ``metrics.jsonl`` has their
            scores as ``eval_NAME``, which ``metric_for_best_model`` can name.
        during_limit: Only the first questions of each bench during training.
    """

    benches: list[str] = []
    data_dir: str = ""
    batch_size: int = Field(default=16, ge=1)
    blind: bool = True
    limit: int | None = Field(default=None, ge=1)
    every_steps: int | None = Field(default=None, ge=1)
    during_limit: int = Field(default=200, ge=1)


class TrainingExtras(Section):
    """Our own keys of a ``training`` section; all others go to ``TrainingArguments``.

    Attributes:
        global_batch_size: Samples of one optimizer step over all devices. It gives
            ``gradient_accumulation_steps`` unless that is set, see ``arguments_for``.
        early_stopping_patience: Stop after so many evaluations in a row without a new best.
        on_non_finite: Stop at a loss or gradient that is not finite; or skip and count its step,
            and stop after ten in a row.
        resume_regardless: Resume even from a damaged checkpoint, or with other data or another base
            than the run began with.
    """

    global_batch_size: int | None = Field(default=None, ge=1)
    early_stopping_patience: int | None = Field(default=None, ge=1)
    on_non_finite: Literal["stop", "skip"] = "stop"
    resume_regardless: bool = False


class VariantSection(Section):
    """One side of a comparison: the run's own settings with these put over them.

    Attributes:
        name: Its folder below the run folder, and its name on the page.
        adapter: Keys of the ``adapter`` section.
        projector: Keys of the ``projector`` section.
        training: Keys of the ``training`` section.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    adapter: dict[str, Any] = {}
    projector: dict[str, Any] = {}
    training: dict[str, Any] = {}


class Config(Section):
    """All settings of one run, or of runs to be compared.

    ``training`` holds keys of ``transformers.TrainingArguments`` and those of ``TrainingExtras``.
    ``compare`` lists what is trained instead of one run, each in a folder of its name.
    """

    model: ModelSection
    data: DataSection
    adapter: MiloraConfig = MiloraConfig()
    projector: ProjectorSection = ProjectorSection()
    alignment: AlignmentSection | None = None
    training: dict[str, Any] = {}
    eval: EvalSection = EvalSection()
    compare: list[VariantSection] = []
    run_folder: str = "runs/run"
    seed: int = 0


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides and check everything.

    Args:
        path: The YAML file.
        overrides: For example ``["training.max_steps=10", "adapter.r=64"]``; values are YAML.

    Raises:
        ConfigError: If the file is missing or malformed, or a key or value is wrong; the message
            names the file, the key and the nearest known name.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Loader) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; shipped ones are in configs/") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """Check plain values and return the typed config; raises as ``load_config`` does."""
    try:
        config = Config.model_validate(expand_cache(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, item) for item in error.errors())) from None
    _check_training(config.training, f"{where}: training")
    if config.alignment:
        _check_training(config.alignment.training, f"{where}: alignment.training")
    if config.training.get("fp16") and config.model.dtype == "bfloat16":
        raise ConfigError(
            f"{where}: training.fp16 multiplies in float16, which torch does not mix with weights "
            "in bfloat16; set model.dtype to float16 or float32, or training.bf16 instead"
        )
    if config.compare:
        variants(config, where)
    return config


def adapter_config(
    overrides: Iterable[str], defaults: Mapping[str, Any] | None = None
) -> MiloraConfig:
    """Return the adapter section that ``adapter.key=value`` words describe, without a config file.

    Args:
        overrides: The words.
        defaults: Values of keys that no word sets.

    Raises:
        ConfigError: If a word names another section, or a key or value is wrong.
    """
    values: dict[str, Any] = {"adapter": dict(defaults or {})}
    for override in overrides:
        apply_override(values, override)
    if other := sorted(values.keys() - {"adapter"}):
        raise ConfigError(f"{other[0]}: only adapter.key=value is taken here")
    try:
        return MiloraConfig.model_validate(values["adapter"])
    except ValidationError as error:
        lines = [_explain("words", {**item, "loc": ("adapter", *item["loc"])})
                 for item in error.errors()]  # fmt: skip
        raise ConfigError("\n".join(lines)) from None


def variants(config: Config, where: str = "config") -> dict[str, Config]:
    """Return the config of every run that ``compare`` lists, by name.

    Raises:
        ConfigError: If there is only one, a name stands twice, or a key or value is wrong.
    """
    names = [variant.name for variant in config.compare]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"{where}: compare: two names or more are needed, all different: {names}")
    found = {}
    for variant in config.compare:
        # parsed again, so that a variant passes the same checks as any config
        values = config.model_dump(exclude={"compare"})
        for section in ("adapter", "projector", "training"):
            values[section] = values[section] | getattr(variant, section)
        found[variant.name] = parse_config(values, f"{where}: compare: {variant.name}")
    return found


def dump_config(config: Config, path: Path | str) -> None:
    """Write the resolved config; ``load_config`` of the file gives an equal config."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text_atomic(path, text)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _explain(where: str, error: Mapping[str, Any]) -> str:
    location = tuple(error["loc"])
    name = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        hint = nearest(str(location[-1]), known, f"known: {', '.join(known)}")
        return f"{where}: unknown key {name!r}; {hint}"
    return f"{where}: {name}: {error['msg']}, got {error.get('input')!r}"


def split_training(training: Mapping[str, Any]) -> tuple[TrainingExtras, dict[str, Any]]:
    """Split a ``training`` section into our keys and those of ``TrainingArguments``.

    Raises:
        pydantic.ValidationError: If a value of ours cannot be used.
    """
    ours = {key: training[key] for key in TrainingExtras.model_fields if key in training}
    rest = {key: value for key, value in training.items() if key not in ours}
    return TrainingExtras.model_validate(ours), rest


def arguments_for(
    training: Mapping[str, Any], devices: int, *, warn: bool = True
) -> dict[str, Any]:
    """Return the keys of ``TrainingArguments``, with the accumulation that the batch asks for.

    ``gradient_accumulation_steps`` becomes ``global_batch_size`` / (devices x batch a device),
    rounded, unless the section sets it. If the global batch cannot be met, that is one warning.

    Args:
        training: A ``training`` section.
        devices: Processes that train together, one a device.
        warn: Whether to warn; a forecast leaves it to the training.
    """
    extras, arguments = split_training(training)
    wanted = extras.global_batch_size
    if wanted is None:
        return arguments
    at_once = devices * arguments.get("per_device_train_batch_size", 8)
    steps = arguments.get("gradient_accumulation_steps") or max(1, round(wanted / at_once))
    if warn and steps * at_once != wanted:
        _warn_of_batch(devices, at_once // devices, steps, wanted)
    return {**arguments, "gradient_accumulation_steps": steps}


@lru_cache  # arguments are built to check them, to plan and to train: one warning for all
def _warn_of_batch(devices: int, per_device: int, steps: int, wanted: int) -> None:
    logger.warning(
        "the global batch is %d samples (%d devices x %d x %d accumulated), not the %d of "
        "training.global_batch_size; its learning rate was chosen for that. Change "
        "training.per_device_train_batch_size or training.gradient_accumulation_steps",
        steps * devices * per_device,
        devices,
        per_device,
        steps,
        wanted,
    )


# Smallest allowed values of settings that transformers does not check.
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "num_train_epochs": 0, "learning_rate": 0,
    "weight_decay": 0, "max_grad_norm": 0, "dataloader_num_workers": 0, "save_total_limit": 1,
}  # fmt: skip
# They may be shares of all steps, so any number above zero will do.
ABOVE_ZERO = ("save_steps", "logging_steps", "eval_steps")
# Checked by type only: whether they work depends on the machine that trains.
HARDWARE_KEYS = (
    "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "torch_compile",
    "deepspeed", "fsdp", "fsdp_config",
)  # fmt: skip


def _check_training(training: Mapping[str, Any], where: str) -> None:
    """Check names, types and values of a ``training`` section; no device is touched.

    Raises:
        ConfigError: If ``TrainingArguments`` would refuse it, or would read a value as another
            type.
    """
    from transformers import TrainingArguments  # seconds to import; only a whole config needs it

    try:
        _, arguments = split_training(training)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, item) for item in error.errors())) from None
    known = {field.name: str(field.type) for field in dataclasses.fields(TrainingArguments)}
    for key, value in arguments.items():
        if key not in known:
            hint = nearest(
                key, [*known, *TrainingExtras.model_fields], "see transformers.TrainingArguments"
            )
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
        _check_type(f"{where}: {key}", value, known[key])
    _check_reporters(arguments.get("report_to"), where)

    class OnPaper(TrainingArguments):
        """Runs the parent's checks without setting up a device or processes."""

        @property
        def device(self) -> str:
            return "cpu"

    # built once, because most values are only checked when the arguments are made
    rest = {key: value for key, value in arguments.items() if key not in HARDWARE_KEYS}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # repeated when the run starts
            OnPaper(**({"output_dir": "unused"} | rest), use_cpu=True)
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        text = str(error).strip().splitlines()[0]
        raise ConfigError(f"{where}: {_shorten(text, rest)}") from error


def _shorten(message: str, arguments: Mapping[str, Any]) -> str:
    """Shorten transformers' list of all choices to the key and the nearest choice."""
    found = re.match(r"(\S+) is not a valid \w+, please select one of \[(.*)\]", message)
    if not found:
        return message
    value, choices = found[1], re.findall(r"'([^']+)'", found[2])
    key = next((key for key, one in arguments.items() if one == value), "value")
    return f"{key}: unknown choice {value!r}; {nearest(value, choices, ', '.join(choices))}"


def _check_type(name: str, value: Any, annotation: str) -> None:
    """Refuse a value that YAML reads as another type than the key has.

    Raises:
        ConfigError: With what to write instead.
    """
    key, is_bool = name.rpartition(" ")[2], isinstance(value, bool)
    takes_bool, takes_number = "bool" in annotation, re.search(r"int|float", annotation)
    takes_text = re.search(r"str|dict|list", annotation)
    if value is None or (key == "bf16" and value == "auto"):
        return
    if is_bool and not takes_bool:
        word = "yes" if value else "no"
        hint = f"; YAML reads {word} as {str(value).lower()}, write \"'{word}'\""
        raise ConfigError(f"{name}: {value} is not allowed here{hint if takes_text else ''}")
    if is_bool or takes_text:
        return
    if key == "bf16":
        raise ConfigError(f"{name}: {value!r} is not one of {BF16_CHOICES}")
    if takes_bool:
        raise ConfigError(f"{name}: true or false is needed, got {value!r}")
    if takes_number:
        _check_number(name, value, whole="float" not in annotation)


def _check_number(name: str, value: Any, *, whole: bool) -> None:
    if not isinstance(value, int | float):
        raise ConfigError(f"{name}: a number is needed, got {value!r}")
    if not math.isfinite(value):
        raise ConfigError(f"{name}: a finite number is needed, got {value}")
    if whole and not isinstance(value, int):
        raise ConfigError(f"{name}: a whole number is needed, got {value}")
    key = name.rpartition(" ")[2]
    if key in ABOVE_ZERO and value <= 0:
        never = key.replace("steps", "strategy")
        raise ConfigError(f"{name}: {value} is too small; for never, set {never} to \"'no'\"")
    least = LEAST.get(key)
    if least is not None and value < least:
        raise ConfigError(f"{name}: {value} is too small; the least is {least}")


def _check_reporters(names: str | list[str] | None, where: str) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    for name in [names] if isinstance(names, str) else names or []:
        if name not in known:
            hint = nearest(str(name), known, f"known: {', '.join(known)}")
            raise ConfigError(f"{where}: report_to: unknown back-end {name!r}; {hint}")
