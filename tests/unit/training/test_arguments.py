"""Laws of the training section: every key has its effect, is passed on, or is refused."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from milora_vl.config import ConfigError, TrainingExtras
from milora_vl.training.arguments import (
    REFUSED,
    StageArguments,
    build_arguments,
    check_training_keys,
)

FIELDS = {item.name: item for item in dataclasses.fields(TrainingArguments)}


def another_value(default: object) -> object:
    """Return a value that is not the default, of its type where it has one."""
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "something"


def test_refused_keys_and_our_own_are_known() -> None:
    assert REFUSED.keys() <= FIELDS.keys()
    own = {item.name for item in dataclasses.fields(StageArguments)} - FIELDS.keys()
    assert own == TrainingExtras.model_fields.keys() - {"global_batch_size"}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_key_is_refused_or_reaches_the_trainer(name: str, tmp_path: Path) -> None:
    default = FIELDS[name].default
    if name in REFUSED:
        allowed = (None, default, *REFUSED[name].allowed)
        for value in (another_value(default), "something", True, False):
            if all(value is not one for one in allowed):
                with pytest.raises(ConfigError, match=name):
                    check_training_keys({name: value})
        check_training_keys({name: default})
    elif name in ("torch_empty_cache_steps", "ddp_bucket_cap_mb", "data_seed"):
        assert getattr(build_arguments({name: 3}, tmp_path, 0), name) == 3
    elif isinstance(default, bool) and name not in ("auto_find_batch_size", "bf16", "fp16"):
        settings = {name: not default, "eval_strategy": "epoch", "dataloader_num_workers": 1}
        settings |= {"save_strategy": "epoch"}
        if name != "use_liger_kernel":
            check_training_keys(settings)
        if name not in ("use_cpu", "dataloader_pin_memory", "torch_compile"):  # the machine's
            assert getattr(build_arguments(settings, tmp_path, 0), name) is not default


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"optim": "galore_adamw"}, "galore"),
        ({"optim": "lomo"}, "lomo"),
        ({"optim": "schedule_free_adamw"}, "pip install schedulefree"),
        ({"optim_args": "momentum=0.9"}, "optim_args"),
        ({"use_liger_kernel": True}, "pip install liger-kernel"),
        ({"report_to": ["none", "clearml"]}, "pip install clearml"),
        ({"train_sampling_strategy": "batch_rebalance"}, "group_by_length"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config"),
        ({"resume_from_checkpoint": "/nowhere"}, "no checkpoint folder"),
        ({"max_steps": 0}, "max_steps"),
        ({"num_train_epochs": 0}, "num_train_epochs"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor"),
        ({"load_best_model_at_end": True}, "eval_strategy"),
        ({"early_stopping_patience": 2}, "eval_strategy"),
        ({"eval_strategy": "steps", "metric_for_best_model": "accuracy"}, "known: eval_loss"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "does not fit lr_scheduler_type: linear"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"adam_beta2": 1.5}, "adam_beta2"),
        ({"fp16": True, "bf16": True}, "both on"),
        ({"torch_compile_backend": "nonsense"}, "torch_compile_backend"),
        ({"eval_steps": 5}, "eval_strategy"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_strategy: steps"),
        ({"eval_delay": 5}, "eval_strategy"),
        ({"greater_is_better": True}, "load_best_model_at_end"),
        ({"save_steps": 5, "save_strategy": "epoch"}, "save_strategy: steps"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "gradient_checkpointing"),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "constant_with_warmup"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_loaded(training: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_training_keys(training)


def test_what_is_switched_off_with_no_may_keep_its_other_keys() -> None:
    off = {"eval_strategy": "no", "eval_steps": 5, "save_strategy": "no", "save_steps": 5}
    check_training_keys(off, has_validation=False)
    check_training_keys({"lr_scheduler_type": "cosine_with_min_lr",
                         "lr_scheduler_kwargs": {"min_lr": 1e-6}, "warmup_steps": 3})  # fmt: skip


def test_the_best_is_chosen_by_what_is_measured() -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        check_training_keys(steps, has_validation=False)
    by_bench = steps | {"metric_for_best_model": "eval_pope"}
    with pytest.raises(ConfigError, match="known: eval_loss"):
        check_training_keys(by_bench)
    check_training_keys(by_bench, has_validation=False, benches=["pope"], every_steps=4)
    with pytest.raises(ConfigError, match="both must be the same"):
        check_training_keys(by_bench, benches=["pope"], every_steps=8)


def test_benches_make_evaluations(tmp_path: Path) -> None:
    arguments = build_arguments({}, tmp_path, 0, every_steps=6)
    assert (arguments.eval_strategy, arguments.eval_steps) == ("steps", 6)
    with pytest.raises(ConfigError, match=r"eval\.every_steps"):
        build_arguments({"eval_strategy": "steps", "eval_steps": 4}, tmp_path, 0, every_steps=6)
