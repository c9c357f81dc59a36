"""The ``training`` section of a config -> arguments of a ``VlmTrainer``.

Every key of ``transformers.TrainingArguments`` works here or is refused with the reason.
``REFUSED`` names those that would have no effect or a wrong one; all others are honored by
``VlmTrainer`` or reach ``transformers.Trainer`` untouched.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments, get_scheduler

from milora_vl.config import ConfigError, arguments_for, split_training

logger = logging.getLogger(__name__)

SAMPLING = ("group_by_length", "random", "sequential")


@dataclass(frozen=True)
class Refusal:
    """Why a key is refused, and the values that are not.

    Attributes:
        reason: For the message, with what to do instead.
        allowed: Values besides the default that are accepted because they change nothing.
    """

    reason: str
    allowed: tuple[Any, ...] = ()


_SHARDED = "an adapter cannot be saved from tensors that are sharded over processes; " \
    "several processes train with `accelerate launch` alone"  # fmt: skip
_NO_PREDICTIONS = "validation computes the loss and keeps no predictions; benches go to eval"
_NO_HUB = "nothing is pushed from here; `milora-vl export` makes a folder to upload"
_NO_FULL_EVAL = "validation runs in the precision of training; a cast of the whole model would " \
    "round the factors that train"  # fmt: skip
_NOT_A_SCRIPT = "the run does what data, eval and eval_strategy say"

REFUSED: dict[str, Refusal] = {
    "do_train": Refusal(_NOT_A_SCRIPT, (True,)),
    "enable_jit_checkpoint": Refusal("SIGTERM always ends a run with a checkpoint of its last "
                                     "step", (True,)),
    "label_names": Refusal("a batch has its answers under 'labels'", (["labels"],)),
    "length_column_name": Refusal("the lengths are those of the encoded samples"),
    "local_rank": Refusal("the launcher sets it"),
    "logging_nan_inf_filter": Refusal("a loss that is not finite is never hidden; "
                                      "training.on_non_finite says what happens", (False,)),
    "optim_target_modules": Refusal("it belongs to optimizers that project full weight matrices, "
                                    "of which an adapter trains none"),
    "output_dir": Refusal("checkpoints go to the run folder; set run_folder"),
    "prediction_loss_only": Refusal(_NO_PREDICTIONS, (True,)),
    "remove_unused_columns": Refusal("samples hold what the model takes and nothing else",
                                     (False,)),
    "seed": Refusal("the whole run has one seed; set the config's own key seed"),
    "use_cache": Refusal("training needs no cache of keys and values"),
}  # fmt: skip
for _reason, *_keys in (
    (_SHARDED, "deepspeed", "fsdp", "fsdp_config", "parallelism_config"),
    (_NOT_A_SCRIPT, "do_eval", "do_predict"),
    (_NO_FULL_EVAL, "bf16_full_eval", "fp16_full_eval"),
    (_NO_PREDICTIONS, "batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches",
     "eval_use_gather_object", "include_for_metrics"),
    (_NO_HUB, "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision",
     "hub_strategy", "hub_token", "push_to_hub"),
):  # fmt: skip
    REFUSED |= dict.fromkeys(_keys, Refusal(_reason))

# Optimizers, by the beginning of their name: the package that holds them, None where refused.
_PACKAGES = {
    "adamw_anyprecision": "torchdistx", "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao", "adamw_torch_npu": "torch_npu", "adamw_torch_xla": "torch_xla",
    "ademamix": "bitsandbytes", "adamw_bnb": "bitsandbytes", "adamw_8bit": "bitsandbytes",
    "lion": "bitsandbytes", "paged": "bitsandbytes", "rmsprop_bnb": "bitsandbytes",
    "grokadamw": "grokadamw", "schedule_free": "schedulefree", "stable_adamw": "optimi",
}  # fmt: skip
_UNFIT_OPTIMIZERS = {
    "galore": "projects the gradients of full weight matrices, of which an adapter trains none",
    "apollo": "projects the gradients of full weight matrices, of which an adapter trains none",
    "lomo": "moves weights during the backward pass, before a gradient can be checked or summed",
    "adalomo": "moves weights during the backward pass, before a gradient can be checked or summed",
}
_IGNORES_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor", "adamw_torch_xla",
                       "adamw_torch_npu_fused")  # fmt: skip
_REPORTERS = {
    "azure_ml": ("azureml",), "clearml": ("clearml",), "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",), "dagshub": ("dagshub",), "dvclive": ("dvclive",),
    "flyte": ("flytekit",), "mlflow": ("mlflow",), "neptune": ("neptune",),
    "swanlab": ("swanlab",), "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",), "wandb": ("wandb",),
}  # fmt: skip
_PYPI = {"optimi": "torch-optimi", "azureml": "azureml-mlflow"}
_ACCELERATOR_KEYS = ("even_batches", "non_blocking", "gradient_accumulation_kwargs")


@dataclass
class StageArguments(TrainingArguments):
    """``TrainingArguments`` with the keys of this package, see ``config.TrainingExtras``.

    Attributes:
        early_stopping_patience: Stop after so many evaluations in a row without a new best.
        on_non_finite: Stop at a loss or gradient that is not finite, or skip its step.
        resume_regardless: Resume even from an incomplete checkpoint, or with other data or another
            base.
    """

    early_stopping_patience: int | None = field(default=None)
    on_non_finite: Literal["stop", "skip"] = field(default="stop")
    resume_regardless: bool = field(default=False)


def check_training_keys(
    training: Mapping[str, Any],
    *,
    where: str = "training",
    has_validation: bool = True,
    benches: Sequence[str] = (),
    every_steps: int | None = None,
) -> None:
    """Refuse keys that would have no effect or a wrong one, before anything is loaded.

    Args:
        training: A ``training`` section; its keys are known and their values of the right type.
        where: What to name in errors.
        has_validation: Whether there are records to validate on.
        benches: Benches that run during training.
        every_steps: Steps between two of their runs.

    Raises:
        ConfigError: Naming the key, the reason and what to do instead.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    for key, value in training.items():
        refusal = REFUSED.get(key)
        # an allowed value of another type is another value: True == 1
        harmless = refusal and any(
            type(value) is type(one) and value == one
            for one in (defaults.get(key), None, *refusal.allowed)
        )
        if refusal and not harmless:
            raise ConfigError(f"{where}.{key}: {value!r} is refused: {refusal.reason}")
    _check_counts(training, where)
    _check_together(training, where, evaluates=bool(every_steps and benches))
    _check_schedule(training, where)
    _check_optimizer(training, where)
    _check_packages(training, where)
    _check_loading(training, where)
    _check_evaluation(training, where, has_validation, list(benches), every_steps)


def _check_counts(training: Mapping[str, Any], where: str) -> None:
    """Refuse numbers that train nothing or are out of range."""
    if training.get("max_steps") == 0:
        raise ConfigError(f"{where}.max_steps: 0 steps train nothing; -1 leaves it to the epochs")
    if training.get("max_steps", -1) < 0 and training.get("num_train_epochs", 1) <= 0:
        raise ConfigError(f"{where}.num_train_epochs: no epoch trains nothing")
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= training.get(key, 0.0) < 1:
            raise ConfigError(f"{where}.{key}: {training[key]} is not in [0, 1)")
    smoothing = training.get("label_smoothing_factor") or 0.0
    if not 0 <= smoothing < 1:
        raise ConfigError(f"{where}.label_smoothing_factor: {smoothing} is not in [0, 1)")


def _check_together(training: Mapping[str, Any], where: str, evaluates: bool) -> None:
    """Refuse keys that have no effect without another one, where that one is not set."""
    saving = training.get("save_strategy", "steps")
    # "no" counts as set: overrides use it to switch off a strategy of the config
    measures = evaluates or training.get("eval_strategy") is not None
    by_steps = ("steps", "no", False)
    chooses = (
        training.get("load_best_model_at_end")
        or training.get("early_stopping_patience")
        or saving == "best"
        or training.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    )
    beside = {
        "eval_delay": (measures, "eval_strategy"),
        "eval_steps": (
            evaluates or training.get("eval_strategy") in by_steps, "eval_strategy: steps"),
        "gradient_checkpointing_kwargs": (
            training.get("gradient_checkpointing") is not None, "gradient_checkpointing"),
        "greater_is_better": (chooses, "load_best_model_at_end or early_stopping_patience"),
        "liger_kernel_config": (training.get("use_liger_kernel") is not None, "use_liger_kernel"),
        "logging_steps": (training.get("logging_strategy", "steps") in by_steps,
                          "logging_strategy: steps"),
        "save_steps": (saving in by_steps, "save_strategy: steps"),
        "warmup_steps": (training.get("lr_scheduler_type") != "constant",
                         "an lr_scheduler_type that warms up, such as constant_with_warmup"),
    }  # fmt: skip
    for key, (acts, needed) in beside.items():
        if training.get(key) not in (None, 0) and not acts:
            raise ConfigError(
                f"{where}.{key}: {training[key]!r} does nothing by itself; set {needed}, or remove "
                "the key"
            )
    if training.get("fp16") is True and training.get("bf16") is True:
        raise ConfigError(f"{where}: fp16 and bf16 are both on; remove one of the two keys")


def _check_schedule(training: Mapping[str, Any], where: str) -> None:
    """Build the schedule once, which transformers does only after the model is loaded."""
    name = training.get("lr_scheduler_type", "linear")
    settings = training.get("lr_scheduler_kwargs") or {}
    if not isinstance(settings, Mapping):  # text, which TrainingArguments reads
        return
    rate = training.get("learning_rate", 1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=dict(settings))
    except (TypeError, ValueError) as error:
        text = str(error).split("() ")[-1]  # without the name of a function in transformers
        raise ConfigError(
            f"{where}.lr_scheduler_kwargs: {dict(settings)} does not fit lr_scheduler_type: "
            f"{name}: {text}"
        ) from error


def _check_optimizer(training: Mapping[str, Any], where: str) -> None:
    name = training.get("optim", "adamw_torch_fused")
    for start, reason in _UNFIT_OPTIMIZERS.items():
        if name.startswith(start):
            raise ConfigError(f"{where}.optim: {name} is refused: it {reason}; use adamw_torch")
    if training.get("optim_args") and name in _IGNORES_OPTIM_ARGS:
        raise ConfigError(
            f"{where}.optim_args: {name} ignores it; its settings are separate keys, such as "
            "adam_beta2"
        )


def _check_packages(training: Mapping[str, Any], where: str) -> None:
    """Refuse keys whose optional package is not installed, before anything is loaded."""
    name = training.get("optim", "adamw_torch_fused")
    wanted = [(f"optim: {name}", (p,)) for start, p in _PACKAGES.items() if name.startswith(start)]
    if training.get("use_liger_kernel"):
        wanted.append(("use_liger_kernel", ("liger_kernel",)))
    reporters = training.get("report_to") or []
    for reporter in [reporters] if isinstance(reporters, str) else reporters:
        if reporter in _REPORTERS:
            wanted.append((f"report_to: {reporter}", _REPORTERS[reporter]))
    for key, packages in wanted:
        if not any(find_spec(package) for package in packages):
            package = _PYPI.get(packages[0], packages[0].replace("_", "-"))
            raise ConfigError(
                f"{where}.{key} needs a package that is not installed: pip install {package}"
            )


def _check_loading(training: Mapping[str, Any], where: str) -> None:
    strategy = training.get("train_sampling_strategy", SAMPLING[0])
    if strategy not in SAMPLING:
        raise ConfigError(
            f"{where}.train_sampling_strategy: {strategy} is refused: batches hold one modality "
            f"and one number of samples; choose {', '.join(SAMPLING)}"
        )
    if training.get("dataloader_num_workers", 0) == 0:
        for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers",
                    "dataloader_multiprocessing_context"):  # fmt: skip
            if training.get(key):
                raise ConfigError(
                    f"{where}.{key}: there is no worker process; set dataloader_num_workers"
                )
    backend = training.get("torch_compile_backend")
    if backend is not None and backend.upper() not in DynamoBackend.list():
        raise ConfigError(
            f"{where}.torch_compile_backend: unknown choice {backend!r}; "
            f"{', '.join(DynamoBackend.list()).lower()}"
        )
    settings = training.get("accelerator_config") or {}
    unknown = [key for key in settings if key not in _ACCELERATOR_KEYS]
    if not isinstance(settings, dict) or unknown:
        raise ConfigError(
            f"{where}.accelerator_config: {settings!r} would deal batches out in another way than "
            f"the order of the samples needs; it may set {', '.join(_ACCELERATOR_KEYS)}"
        )
    resume = training.get("resume_from_checkpoint")
    if resume is False or (isinstance(resume, str) and not Path(resume).expanduser().is_dir()):
        raise ConfigError(
            f"{where}.resume_from_checkpoint: {resume!r} is no checkpoint folder; a run resumes "
            "from its own checkpoints by itself, and starts over in another run folder"
        )


def _check_evaluation(
    training: Mapping[str, Any],
    where: str,
    has_validation: bool,
    benches: list[str],
    every_steps: int | None,
) -> None:
    """Check what is measured during training, and by what the best checkpoint is chosen."""
    asked = bool(every_steps and benches)
    evaluates = _is_on(training.get("eval_strategy")) or asked
    # the validation loss is made of validation data, scores of benches
    known = (["eval_loss"] if has_validation else []) + (
        [f"eval_{bench}" for bench in benches] if asked else []
    )
    if _is_on(training.get("eval_strategy")) and not known:
        raise ConfigError(
            f"{where}.eval_strategy: {training['eval_strategy']}: there is nothing to evaluate on; "
            "set data.validation, or eval.every_steps for a bench, or remove the key"
        )
    best = training.get("load_best_model_at_end") or training.get("save_strategy") == "best"
    for key in ("eval_on_start", "early_stopping_patience"):
        if training.get(key) and not evaluates:
            raise ConfigError(f"{where}.{key} needs evaluations; set eval_strategy")
    if best and not evaluates:
        raise ConfigError(f"{where}: a best checkpoint needs evaluations; set eval_strategy")
    metric = training.get("metric_for_best_model") or "loss"
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    needed = best or training.get("early_stopping_patience") or training.get(
        "lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")  # fmt: skip
    if (needed or "metric_for_best_model" in training) and metric not in known:
        raise ConfigError(
            f"{where}.metric_for_best_model: {metric.removeprefix('eval_')} is not measured during "
            f"training; known: {', '.join(known) or 'none'}"
        )
    steps = training.get("eval_steps")
    if metric != "eval_loss" and needed and steps and steps != every_steps:
        raise ConfigError(
            f"{where}.eval_steps: {steps} but eval.every_steps: {every_steps}; the best checkpoint "
            "is chosen by a bench's score, so both must be the same"
        )


def _is_on(strategy: Any) -> bool:
    return strategy not in (None, "no", False)


def build_arguments(
    training: Mapping[str, Any], folder: Path, seed: int, every_steps: int | None = None
) -> StageArguments:
    """Turn a ``training`` section into the arguments of one stage.

    Defaults: checkpoints go to ``folder``, two are kept, and there is no logging back-end.

    Args:
        training: The section, checked by ``check_training_keys``.
        folder: Of the checkpoints.
        seed: Of order and dropout.
        every_steps: Steps between two runs of the benches, which makes evaluations of these steps.

    Raises:
        ValueError: If transformers refuses a value, or one process would spread its batches over
            several GPUs.
    """
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "report_to": "none",
        "save_total_limit": 2,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
        "train_sampling_strategy": SAMPLING[0],
    }
    extras, _ = split_training(training)
    settings = defaults | arguments_for(training, int(os.environ.get("WORLD_SIZE", "1")))
    settings |= extras.model_dump(exclude={"global_batch_size"})
    settings["enable_jit_checkpoint"] = False  # ``StopOnSigterm`` handles SIGTERM
    if settings.get("save_strategy") == "best":  # the best is also delivered
        settings.setdefault("load_best_model_at_end", True)
    if settings.get("early_stopping_patience"):
        settings.setdefault("metric_for_best_model", "loss")
    if every_steps:
        settings |= _with_benches(settings, every_steps)
    if settings.get("tf32") and not torch.cuda.is_available():
        logger.warning("training.tf32 is a setting of CUDA devices and does nothing here")
        settings["tf32"] = None
    if settings.get("fp16") and not torch.cuda.is_available():
        logger.warning("training.fp16 is a setting of GPUs; training here runs in float32")
    arguments = StageArguments(**settings)
    if arguments.auto_find_batch_size and arguments.world_size > 1:
        raise ConfigError(
            "training.auto_find_batch_size: one process may lack memory while the others wait for "
            "it; with several processes set per_device_train_batch_size"
        )
    if arguments.n_gpu > 1:  # DataParallel averages the losses of unequal parts
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one process a GPU with "
            "`accelerate launch -m milora_vl train CONFIG`, or set CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


def _with_benches(settings: Mapping[str, Any], every_steps: int) -> dict[str, Any]:
    """Return the keys that make every step with a bench an evaluation."""
    if not _is_on(settings.get("eval_strategy")):
        return {"eval_strategy": "steps", "eval_steps": every_steps}
    steps = settings.get("eval_steps")
    if settings["eval_strategy"] != "steps" or (steps and every_steps % steps):
        raise ConfigError(
            f"eval.every_steps: {every_steps} needs training.eval_strategy: steps with eval_steps "
            f"that divide it (now {settings['eval_strategy']}, {steps})"
        )
    return {"eval_steps": steps or every_steps}
