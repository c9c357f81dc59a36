"""A run's settings: typed sections, read from YAML plus ``section.key=value`` overrides.

YAML as people write it: numbers, repeated keys, overrides and the cache folder.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from milora_vl.files import cache_folder, write_text_atomic
from milora_vl.runtime import BF16_CHOICES


class ConfigError(ValueError):
    """A configuration that cannot be used; the text says where and what to write instead."""


class Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; refuse repeated keys, of which YAML would keep the last."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: key written twice: {sorted(twice)}"
            )
        return super().construct_mapping(node, deep)


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
        init: Method that gives the first values: "milora"; "pissa", "slice:middle" and
            "slice:random" (other parts of the spectrum); PEFT's "lora", "rslora", "dora", "olora"
            and "mica"; "null_space" (see ``milora_vl.adapter.baselines``).
        slice: With init "milora", where in the spectrum to start: minor (MiLoRA), principal
            (PiSSA), middle, random.
        residual: "subtract" writes W_p into the base weights; "anchor" keeps them and subtracts
            with a frozen second adapter; "auto" subtracts in float32 and NF4, else anchors.
        svd: Decomposition method, see ``milora_vl.adapter.minor_svd``.
        target_modules: "all-linear" (attention and MLP of the language model), a regular
            expression for full names, or a list of names or name endings.
        lora_dropout: Dropout before lora_A of the trainable adapter, not of the anchor: at step 0
            the layer equals the pretrained one in eval mode, and on average in train mode.
        train_projector: Train the vision-language projector in full.
        calibration_batches: With init "null_space", how many training batches are looked at.
        allow_outside_language_model: Let ``target_modules`` reach the vision tower and an output
            head of its own weights; otherwise such a pattern is refused.
        factor_cache: Keep the factors below ``$MILORA_CACHE/factors`` for the next start.
        quantization_correction: What is done about the error of NF4, see
            ``milora_vl.adapter.nf4``.
    """

    r: int = Field(default=128, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
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

    @model_validator(mode="after")
    def _slice_fits_init(self) -> "MiloraConfig":
        if self.init != "milora" and self.slice not in ("minor", self.spectrum):
            raise ValueError(
                f"slice={self.slice} contradicts init={self.init}; remove one of the two keys"
            )
        return self

    @property
    def spectrum(self) -> Slice | None:
        """The slice the adapter starts from, or None where the method takes none."""
        return self.slice if self.init == "milora" else INIT_SLICES.get(self.init)

    @property
    def scaling(self) -> float:
        """Factor before B A: lora_alpha / r, or lora_alpha / sqrt(r) with init "rslora"."""
        r = self.r**0.5 if self.init == "rslora" else self.r
        return (self.lora_alpha or self.r) / r


class ModelSection(Section):
    """Which model, and how it is loaded.

    Attributes:
        path: Hub id, folder, or "demo" for the embedded small model.
        revision: Hub revision (branch, tag or commit).
        dtype: Weights' dtype in memory; "auto" keeps the checkpoint's.
        quantization: "nf4" quantises the language model's linears while they are read.
        device: "auto" takes CUDA when there is one.
        attn_implementation: Passed to transformers: "sdpa", "flash_attention_2", "eager".
        prompt_style: A name in ``milora_vl.data.prompts.PROMPT_STYLES``, or "chat_template".
        trust_remote_code: Run code that comes with the checkpoint. Off unless you ask for it.
        allow_pickle: Also read weights that are not safetensors; pickles can run code.
        image_size_px: "demo" only: side of the picture the tower sees, a multiple of 14.
        vision_feature_layer: "demo" only: hidden state(s) of the tower that feed the projector.
    """

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4"] | None = None
    device: str = "auto"
    attn_implementation: str | None = None
    prompt_style: str
    trust_remote_code: bool = False
    allow_pickle: bool = False
    image_size_px: int = Field(default=112, ge=14)
    vision_feature_layer: int | list[int] = 9


class DataSection(Section):
    """Records to train and validate on.

    Attributes:
        train: Files of records, see docs/data.md; ``${MILORA_CACHE}`` is the cache folder.
        image_folder: Folder that the records' image paths start from; empty for text-only records.
        validation: File of records for the validation loss; None for none.
        max_length: Longest sequence in tokens; answers are cut to fit, image tokens never.
        turns: "running": a record is one conversation, as in LLaVA. "side_by_side": every exchange
            is learnt as if it were the only one, so that no answer tells another.
        pad_to_square: Keep the aspect ratio by padding with the processor's mean colour.
        on_bad_record: Stop at a record that cannot be used, or leave it out and count it.
        on_bad_image: Stop at an image that cannot be read, or leave its record out and count it.
        ignore_keys: Keys of records that are not read, whatever docs/data.md says of them.
        special_tokens_in_answers: What a special token's name in an answer means: "literal", its
            characters; "token", the token, unless it stands for an image.
        limit, validation_limit: Use only the first records of each file.
    """

    train: list[str] = Field(min_length=1)
    image_folder: str = ""
    validation: str | None = None
    max_length: int = Field(default=2048, ge=8)
    turns: Literal["running", "side_by_side"] = "running"
    pad_to_square: bool = True
    on_bad_record: Literal["error", "skip"] = "error"
    on_bad_image: Literal["error", "skip"] = "error"
    ignore_keys: list[str] = []
    special_tokens_in_answers: Literal["literal", "token"] = "literal"
    limit: int | None = Field(default=None, ge=1)
    validation_limit: int | None = Field(default=None, ge=1)

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class AlignmentSection(Section):
    """Stage 1: the projector alone, before any adapter. Its result is cached as the base model.

    Attributes:
        train: Files of records of this stage, one caption a picture; empty: those of ``data``.
        prompt_style: Style of this stage, for example "plain"; None: the model's.
        patch_steps: Steps of patch alignment, which comes first; needs "objects" in the records.
        patch_learning_rate: Its learning rate.
        patch_pictures: How many pictures it looks at.
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
        blind: Also answer without the picture.
        limit: Only the first questions of each bench.
    """

    benches: list[str] = []
    data_dir: str = ""
    batch_size: int = Field(default=16, ge=1)
    blind: bool = True
    limit: int | None = Field(default=None, ge=1)


class Config(Section):
    """All settings of one run; ``training`` goes to ``TrainingArguments`` unchanged."""

    model: ModelSection
    data: DataSection
    adapter: MiloraConfig = MiloraConfig()
    projector: ProjectorSection = ProjectorSection()
    alignment: AlignmentSection | None = None
    training: dict[str, Any] = {}
    eval: EvalSection = EvalSection()
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
    _check_training_keys(config.training, f"{where}: training")
    if config.alignment:
        _check_training_keys(config.alignment.training, f"{where}: alignment.training")
    return config


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


def _check_training_keys(training: Mapping[str, Any], where: str) -> None:
    from transformers import TrainingArguments  # seconds to import; only a whole config needs it

    known = {field.name: str(field.type) for field in dataclasses.fields(TrainingArguments)}
    for key, value in training.items():
        if key not in known:
            hint = nearest(key, known, "see transformers.TrainingArguments")
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
        if key == "bf16" and not isinstance(value, bool) and value != "auto":
            raise ConfigError(f"{where}: bf16: {value!r} is none of its choices, {BF16_CHOICES}")
        numeric = re.search(r"int|float", known[key]) and "str" not in known[key]
        if numeric and not isinstance(value, int | float | type(None)):
            raise ConfigError(f"{where}: {key}: a number is needed, got {value!r}")
