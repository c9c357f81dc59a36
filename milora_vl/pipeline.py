"""The main job: prepare data, base, evaluate, finetune, evaluate, report.

Only this file takes the whole config apart; the stages get plain arguments.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from milora_vl import forecast, stages
from milora_vl.adapter.targets import match_pattern
from milora_vl.config import (
    Config,
    ConfigError,
    MiloraConfig,
    ModelSection,
    arguments_for,
    variants,
)
from milora_vl.data.prompts import get_style
from milora_vl.environment import describe_environment
from milora_vl.eval.comparison import compare_runs
from milora_vl.eval.evaluation import bench_names, load_items
from milora_vl.files import write_json_atomic
from milora_vl.model.families import PROJECTOR_NAMES, TOWER_NAMES
from milora_vl.model.load import VLM
from milora_vl.plan import (
    count_steps,
    empty_model,
    group_layers,
    guess_load,
    plan_run,
    plan_targets,
)
from milora_vl.run_folder import claim_run_folder, locked
from milora_vl.runtime import (
    Precision,
    choose_precision,
    count_layer_shapes,
    from_main_process,
    gather_json,
    is_main_process,
    measure_precisions,
    memory_gib,
    process_count,
    resolve_device,
    wait_for_all,
)
from milora_vl.training.arguments import build_arguments, check_training_keys
from milora_vl.training.inputs import load_model

logger = logging.getLogger(__name__)


def check_names(config: Config) -> None:
    """Check names that the config's types do not cover: benches, prompt style, attention.

    Raises:
        ConfigError: If one is unknown or does not fit; the message lists the known ones.
    """
    attention = config.model.attn_implementation
    if config.data.turns == "side_by_side" and attention not in (None, "eager", "sdpa"):
        raise ConfigError(
            f"data.turns: side_by_side needs attention that takes a mask, which {attention!r} does "
            "not; set model.attn_implementation to sdpa or eager"
        )
    try:
        if config.eval.benches:
            bench_names(config.eval.benches)
        for name in (config.model.prompt_style, config.alignment and config.alignment.prompt_style):
            if name and name != "chat_template":
                get_style(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_training(config)


def check_adapter(model: ModelSection, adapter: MiloraConfig, *, only_here: bool = False) -> None:
    """Check what an adapter asks of its model, by ``config.json`` alone.

    A model that cannot be described here is passed over: loading it tells why.

    Args:
        model: What it goes on.
        adapter: Its layers and its rank.
        only_here: Ask no hub.

    Raises:
        ConfigError: If ``target_modules`` or ``r`` does not fit, with what would.
    """
    try:
        empty = empty_model(model, only_here=only_here)
    except Exception as error:
        logger.info("%s is not described here: r and target_modules are unchecked", model.path)
        logger.debug("%s", error)
        return
    try:
        targets, _ = plan_targets(empty, adapter, quantized=model.quantization is not None)
        group_layers(empty, targets, adapter)
        match_pattern("alpha_pattern", adapter.alpha_pattern, targets.modules)
    except ValueError as error:
        raise ConfigError(f"adapter: {error}") from error


def check_training(config: Config) -> None:
    """Refuse keys of both training stages that would have no effect or a wrong one.

    Raises:
        ConfigError: Naming the key, the reason and what to do instead.
    """
    if config.eval.every_steps and not config.eval.benches:
        raise ConfigError("eval.every_steps: no bench is named in eval.benches")
    check_training_keys(
        config.training,
        has_validation=config.data.validation is not None,
        benches=bench_names(config.eval.benches) if config.eval.benches else [],
        every_steps=config.eval.every_steps,
    )
    if config.alignment:
        check_training_keys(
            config.alignment.training, where="alignment.training", has_validation=False
        )


def decide_precisions(config: Config) -> dict[str, Precision]:
    """Choose the precision of both training stages; a CPU is timed to choose."""
    device = resolve_device(config.model.device)
    model = cache(lambda: empty_model(config.model))
    weights = getattr(torch, config.model.dtype, None)  # "auto": as stored, float32 in most cases
    sections = {"training": config.training}
    if config.alignment is not None:
        sections["alignment.training"] = config.alignment.training
    found = {}
    for name, section in sections.items():
        # a float16 run has its own scaler; "auto" then has nothing to decide
        asked = section.get("bf16", False) if not section.get("fp16") else False
        found[name] = choose_precision(
            asked,
            lambda: count_layer_shapes(model()),
            device,
            weights=weights or model().config.dtype or torch.float32,
            name=f"{name}.bf16",
        )
        if asked == "auto":
            dtype = "bfloat16" if found[name].bf16 else "float32"
            logger.info("%s.bf16: auto takes %s: %s", name, dtype, found[name].reason)
    return found


def with_precisions(config: Config, precisions: Mapping[str, Precision]) -> Config:
    """Return the config with each ``bf16: auto`` replaced by the decision."""
    update: dict[str, Any] = {"training": _decided(config.training, precisions["training"])}
    if config.alignment is not None:
        training = _decided(config.alignment.training, precisions["alignment.training"])
        update["alignment"] = config.alignment.model_copy(update={"training": training})
    return config.model_copy(update=update)


def _decided(training: dict[str, Any], precision: Precision) -> dict[str, Any]:
    return training | {"bf16": precision.bf16} if training.get("bf16") == "auto" else training


def record_environment(config: Config, file: Path) -> dict[str, Precision]:
    """Write what the run depends on, except its data.

    Returns:
        The precision of each stage: decided here, or by the call that started the run.
    """
    if file.exists():  # a run keeps the precision it started with
        return read_precisions(file) or decide_precisions(config)
    facts = describe_environment(config.seed)
    precisions = decide_precisions(config)
    facts["precision"] = {name: asdict(one) for name, one in precisions.items()}
    facts["prompt_day"] = str(config.model.prompt_day or date.today())
    write_json_atomic(file, facts)
    return precisions


def read_precisions(file: Path) -> dict[str, Precision]:
    """Return the precision of each stage from an ``environment.json``; empty in older ones."""
    kept = json.loads(file.read_text(encoding="utf-8")).get("precision", {})
    return {name: Precision(**values) for name, values in kept.items()}


def with_prompt_day(config: Config, file: Path) -> Config:
    """Return the config with the day the run started, for templates that write the date."""
    kept = json.loads(file.read_text(encoding="utf-8")).get("prompt_day")
    if kept is None:  # started by an older version
        return config
    model = config.model.model_copy(update={"prompt_day": date.fromisoformat(kept)})
    return config.model_copy(update={"model": model})


def record_data(image_folder: str, file: Path) -> None:
    """Add the data's manifest to the environment, or compare it when the run is resumed.

    Raises:
        ConfigError: If the data set was rebuilt since the run started.
    """
    facts = json.loads(file.read_text(encoding="utf-8"))
    source = Path(image_folder) / "manifest.json"
    is_there = bool(image_folder) and source.exists()
    manifest = json.loads(source.read_text(encoding="utf-8")) if is_there else None
    if facts.get("has_data"):
        if facts["data_manifest"] != manifest:
            raise ConfigError(
                f"{file.parent} started with another data set than {image_folder} holds now; give "
                "another folder with --run-folder, or restore the data"
            )
        return
    for left_out in (manifest or {}).get("left_out", []):
        logger.warning("the data set lacks %s, which means %s", left_out["name"], left_out["means"])
    if (manifest or {}).get("drawn_in_code"):
        logger.warning("the images are shapes drawn in code, for tests: the scores say little")
    write_json_atomic(file, facts | {"data_manifest": manifest, "has_data": True})


def needed_files(config: Config) -> list[str | None]:
    """Return the files and folders that the run reads; None for those not configured."""
    files = [*config.data.train, config.data.validation]
    files += config.alignment.train if config.alignment else []
    folders = [config.data.image_folder, config.eval.data_dir if config.eval.benches else None]
    return [*files, *folders]


def find_weights(model: nn.Module) -> forecast.ModelWeights:
    """Count the weights of a model's linear layers by part."""
    counted = {"tower": 0, "projector": 0, "language_model": 0}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
            continue
        words = set(name.split("."))
        part = "projector" if words & set(PROJECTOR_NAMES) else "language_model"
        part = "tower" if words & set(TOWER_NAMES) else part
        counted[part] += module.in_features * module.out_features
    return forecast.ModelWeights(**counted)


def count_work(config: Config) -> forecast.Work:
    """Count the operations of every stage from the config, and from the data if it is there."""
    model = empty_model(config.model)
    weights = find_weights(model)
    load, samples, _ = guess_load(config.data, model.config, config.training)
    training = arguments_for(config.training, process_count(), warn=False)
    accumulated = training.get("gradient_accumulation_steps", 1)
    steps = count_steps(training, samples, load.samples * accumulated) or 0
    tokens = load.tokens if samples else forecast.TOKENS_SHARE * config.data.max_length
    per_sample = (tokens, load.images, load.patches)
    seen = steps * accumulated * load.samples
    questions, blind = _count_questions(config), config.eval.blind
    return forecast.Work(
        training=forecast.training_operations(weights, seen, *per_sample),
        alignment=_alignment_operations(config, model, weights),
        evaluation=forecast.evaluation_operations(weights, questions, load.patches, blind=blind),
        questions=questions * (2 if blind else 1),
    )


def guess_stages(
    config: Config, precision: Precision, done: Mapping[str, bool]
) -> dict[str, float]:
    """Estimate the seconds of every stage on this CPU; empty on a GPU."""
    if resolve_device(config.model.device).type != "cpu":
        return {}
    shapes = count_layer_shapes(empty_model(config.model))
    rates = precision.gflops or measure_precisions(shapes, backward=True)
    dtype = "bfloat16" if precision.bf16 else "float32"
    rate = rates[dtype] * forecast.EFFICIENCY[dtype]
    return forecast.guess_seconds(count_work(config), rate, done)


def _alignment_operations(
    config: Config, model: nn.Module, weights: forecast.ModelWeights
) -> float:
    section = config.alignment
    if section is None:
        return 0.0
    data = config.data.model_copy(update={"train": section.train or config.data.train})
    load, samples, _ = guess_load(data, model.config, section.training)
    found = 0.0
    if section.patch_steps:
        found += 2 * section.patch_pictures * load.patches * weights.tower
        found += 6 * section.patch_steps * PATCHES_PER_STEP * weights.projector
    steps = section.training.get("max_steps", 0)
    tokens = load.tokens if samples else load.patches + forecast.CAPTION_TOKENS
    seen = steps * load.samples
    return found + forecast.training_operations(weights, seen, tokens, load.images, load.patches)


PATCHES_PER_STEP = 2304  # the default of ``training.align``, background included


def _count_questions(config: Config) -> int:
    section = config.eval
    if not section.benches:
        return 0
    try:
        items = load_items(section.benches, Path(section.data_dir), section.limit)
        return sum(map(len, items.values()))
    except (OSError, ValueError):  # not there yet
        most = section.limit if isinstance(section.limit, int) else forecast.QUESTIONS
        return len(bench_names(section.benches)) * min(most, forecast.QUESTIONS)


def warn_of_memory(config: Config) -> None:
    """Warn if the run will not fit into this computer's memory, before anything long starts."""
    if resolve_device(config.model.device).type != "cpu":
        return
    try:
        plan = plan_run(config)
    except Exception as error:  # a plan must not end the run; loading shows what is wrong
        logger.debug("no plan: %s", error)
        return
    needed, there = max(plan.init_gib, plan.training_gib), memory_gib()
    if needed <= there:
        return
    size = config.training.get("per_device_train_batch_size", 8)
    remedies = ["close other programs"]
    if size > 1:
        half = size // 2
        remedies.append(
            f"set training.per_device_train_batch_size={half} and "
            f"training.gradient_accumulation_steps="
            f"{2 * config.training.get('gradient_accumulation_steps', 1)}"
        )
    if not config.training.get("gradient_checkpointing"):
        remedies.append("set training.gradient_checkpointing=true")
    logger.warning(
        "this run needs about %.1f GiB of memory (start %.1f, training %.1f), and %.1f GiB are "
        "free here: %s",
        *(needed, plan.init_gib, plan.training_gib, there, ", or ".join(remedies)),
    )


def run_comparison(config: Config, run_folder: Path) -> Path:
    """Run the job for every entry of ``compare``, and write a page that compares the runs.

    The runs share seed, order of samples, base, precision and the evaluation of the base.

    Args:
        config: The settings, with two entries or more in ``compare``.
        run_folder: Gets a run folder of each entry's name, and ``comparison.html``.

    Returns:
        The page.

    Raises:
        ConfigError: As ``run_pipeline`` does.
    """
    for variant in variants(config).values():  # before any of them takes its hours
        check_names(variant)
        check_adapter(variant.model, variant.adapter, only_here=True)
    folders = []
    decided: dict[str, Precision] | None = None
    for number, (name, variant) in enumerate(variants(config).items(), start=1):
        logger.info("run %d of %d: %s", number, len(config.compare), name)
        if decided:
            variant = with_precisions(variant, decided)
        folders.append(run_folder / name)
        run_pipeline(variant, folders[-1], shared=run_folder)
        decided = decided or read_precisions(folders[-1] / "environment.json")
    page = run_folder / "comparison.html"
    if is_main_process():
        compare_runs(folders, page)
    wait_for_all()
    return page


def run_pipeline(config: Config, run_folder: Path, *, shared: Path | None = None) -> dict[str, Any]:
    """Run the whole job; what an interrupted call finished is not done again.

    Args:
        config: The settings of one run.
        run_folder: For all files, see docs/runs.md.
        shared: Folder that keeps the evaluation of the base for other runs on it.

    Returns:
        ``{"before": results, "after": results, "base": path or id, "timing": {...}}``, results as
        in ``results.json`` (empty without benches).

    Raises:
        ConfigError: If the settings cannot be used or the folder holds another run.
        milora_vl.run_folder.RunBusyError: If another command works in the folder.
    """
    check_names(config)
    if not config.data.prepare:
        stages.prepare_data(None, needed_files(config))
    sections = [(config.training, config.eval.every_steps)]
    sections += [(config.alignment.training, None)] if config.alignment else []
    for section, every_steps in sections:
        # transformers checks the values: before the folder is claimed
        build_arguments(
            section | {"bf16": False} if section.get("bf16") == "auto" else section,
            run_folder / "checkpoints",
            config.seed,
            every_steps,
        )
    stages.prepare_model(config.model.prepare, config.model.path)
    check_adapter(config.model, config.adapter)
    if not is_main_process():
        return _run_claimed(config, run_folder, shared)
    with locked(run_folder):
        return _run_claimed(config, run_folder, shared)


def _run_claimed(config: Config, run_folder: Path, shared: Path | None) -> dict[str, Any]:
    environment = run_folder / "environment.json"
    found = {}
    if is_main_process():
        claim_run_folder(config, run_folder)
        found = {name: asdict(one) for name, one in record_environment(config, environment).items()}
    precisions = {name: Precision(**one) for name, one in from_main_process(found).items()}
    config = with_precisions(config, precisions)
    if environment.exists():
        config = with_prompt_day(config, environment)
    set_seed(config.seed)
    arguments = build_arguments(
        config.training, run_folder / "checkpoints", config.seed, config.eval.every_steps
    )
    schedule = _schedule(config, run_folder, precisions["training"])
    is_fresh = bool(stages.missing_files(needed_files(config)))
    with schedule.stage("data"):
        stages.prepare_data(config.data.prepare, needed_files(config))
        if is_main_process():
            record_data(config.data.image_folder, environment)
        wait_for_all()
    if is_fresh:  # now the records and questions can be counted
        schedule.revise(_guesses(config, run_folder, precisions["training"]))
    with schedule.stage("base"):
        base = stages.prepare_base(
            config.model, config.alignment, config.data, config.seed, run_folder
        )
    pads = config.data.pad_to_square  # benches show images as training does
    # a finished run loads none
    base_vlm = cache(lambda: replace(load_model(config.model, base), pad_to_square=pads))
    with schedule.stage("before"):
        before = stages.evaluate_stage(
            base_vlm,
            config.eval,
            run_folder / "eval_before",
            arguments,
            kept=stages.kept_evaluation(base, config.model, config.eval, arguments, pads=pads)
            or (shared and shared / "eval_before"),
        )
    tuned_vlm = cache(lambda: _finetune(config, base_vlm(), arguments, run_folder))
    with schedule.stage("finetuning"):
        if not all(gather_json(stages.adapter_is_trained(run_folder))):
            tuned_vlm()
    with schedule.stage("after"):
        after = stages.evaluate_stage(
            tuned_vlm,
            config.eval,
            run_folder / "eval_after",
            arguments,
            adapter_name=str(run_folder / "adapter"),
        )
    results = {"before": before, "after": after, "timing": schedule.to_json()}
    stages.report_stage(run_folder, results)
    return {**results, "base": str(base)}


def _finetune(config: Config, vlm: VLM, arguments: TrainingArguments, run_folder: Path) -> VLM:
    return stages.finetune_stage(
        vlm,
        config.adapter,
        config.data,
        arguments,
        run_folder=run_folder,
        projector_section=config.projector,
        evaluation=config.eval,
    )


def _guesses(config: Config, run_folder: Path, precision: Precision) -> dict[str, float]:
    """Return the estimated seconds of every stage, 0 for finished ones; empty if unknown."""
    no_benches = not config.eval.benches
    done = {
        "data": not stages.missing_files(needed_files(config)),
        "base": stages.base_is_done(config.model, config.alignment, config.data, config.seed),
        "before": no_benches or stages.evaluation_is_done(run_folder / "eval_before"),
        "finetuning": stages.adapter_is_trained(run_folder),
        "after": no_benches or stages.evaluation_is_done(run_folder / "eval_after"),
    }
    if all(done.values()) or not is_main_process():
        return {}
    try:
        return guess_stages(config, precision, done)
    except Exception as error:  # an estimate that fails must not end the run
        logger.info("the time cannot be estimated: %s", error)
        return {}


def _schedule(config: Config, run_folder: Path, precision: Precision) -> forecast.Schedule:
    """Estimate the time of the stages that are left, and log it with a warning about memory."""
    guesses = _guesses(config, run_folder, precision)
    if not is_main_process():
        return forecast.Schedule({}, None)
    schedule = forecast.Schedule(guesses, run_folder / "timing.json")
    if guesses:
        warn_of_memory(config)
        logger.info("%s", schedule)
    return schedule
