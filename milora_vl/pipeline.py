"""The main job: base model, evaluation before, finetuning, evaluation after, report."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from milora_vl.adapter.portable import installed_versions
from milora_vl.config import Config, ConfigError, dump_config, load_config
from milora_vl.data.dataset import mixture
from milora_vl.data.prompts import get_style
from milora_vl.environment import describe_environment
from milora_vl.eval import forgetting
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.evaluation import bench_names, evaluate
from milora_vl.eval.report import write_report
from milora_vl.files import cache_folder, sha256_of, write_json_atomic
from milora_vl.model.embedded import cached_demo_base
from milora_vl.model.load import VLM
from milora_vl.plan import empty_model
from milora_vl.runtime import (
    Precision,
    autocast_as,
    choose_precision,
    count_layer_shapes,
    resolve_device,
)
from milora_vl.training import projector
from milora_vl.training.arguments import build_arguments
from milora_vl.training.inputs import build_dataset, load_conversations, load_model
from milora_vl.training.run import finetune

logger = logging.getLogger(__name__)


def claim_run_folder(config: Config, folder: Path) -> None:
    """Make the run folder, or check that the one there belongs to the same config.

    Raises:
        ConfigError: If it holds a run with other settings; the sections that differ are named.
    """
    file = folder / "config.yaml"
    if file.exists():
        before = load_config(file).model_dump(mode="json")
        now = config.model_dump(mode="json")
        differing = [key for key in now if now[key] != before[key] and key != "run_folder"]
        if differing:
            raise ConfigError(
                f"{folder} holds a run with other settings ({', '.join(differing)} differ); "
                "give another folder with --run, or remove it"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; give another folder with --run")
    dump_config(config, file)


def check_names(config: Config) -> None:
    """Check names that the config's own types do not know: benches, prompt style, attention.

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


def decide_precisions(config: Config) -> dict[str, Precision]:
    """Choose the precision of every stage that trains; both are timed where that is to be known."""
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
    """Return the config with each ``bf16: auto`` replaced by what was decided."""
    update: dict[str, Any] = {"training": _decided(config.training, precisions["training"])}
    if config.alignment is not None:
        training = _decided(config.alignment.training, precisions["alignment.training"])
        update["alignment"] = config.alignment.model_copy(update={"training": training})
    return config.model_copy(update=update)


def _decided(training: dict[str, Any], precision: Precision) -> dict[str, Any]:
    return training | {"bf16": precision.bf16} if training.get("bf16") == "auto" else training


def record_environment(config: Config, file: Path) -> dict[str, Precision]:
    """Write what the run depends on; one that goes on must find its data as they were.

    Returns:
        The precision of each stage: decided here, or by the call that began the run.

    Raises:
        ConfigError: If the data set was built anew since the run began.
    """
    folder = config.data.image_folder
    facts = describe_environment(config.seed, Path(folder) / "manifest.json" if folder else None)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["data_manifest"] != facts["data_manifest"]:
            raise ConfigError(
                f"{file.parent} began with another data set than {folder} holds now; give another "
                "folder with --run, or restore the data"
            )
        if "precision" in before:  # a run keeps the arithmetic it began with
            return {name: Precision(**kept) for name, kept in before["precision"].items()}
        return decide_precisions(config)
    manifest = facts["data_manifest"] or {}
    for source in manifest.get("left_out", []):
        logger.warning("the data set lacks %s, which means %s", source["name"], source["means"])
    if manifest.get("drawn_in_code"):
        logger.warning("the pictures are shapes drawn in code, for tests: the scores say little")
    precisions = decide_precisions(config)
    facts["precision"] = {name: asdict(one) for name, one in precisions.items()}
    write_json_atomic(file, facts)
    return precisions


def check_data(config: Config) -> None:
    """Check that the files of the config are there, before anything long starts.

    Raises:
        ConfigError: If one is missing; the message names it and says how the demo's are made.
    """
    files = [*config.data.train, config.data.validation]
    files += config.alignment.train if config.alignment else []
    folders = [config.data.image_folder, config.eval.data_dir if config.eval.benches else None]
    for name in [*files, *folders]:
        if name and not Path(name).exists():
            raise ConfigError(
                f"{name}: not found. The demo's data are made by "
                "`bash scripts/finetune_llava_milora.sh` or `python data_prep/stickervqa.py`"
            )


def prepare_base(config: Config, run_folder: Path) -> Path | str:
    """Return the base model of stage 2: as named, composed, or composed and aligned (cached)."""
    base: Path | str = config.model.path
    if base == "demo":
        base = cached_demo_base(config.model.image_size_px, config.model.vision_feature_layer)
    if config.alignment is None:
        return base
    section = config.alignment
    folder = projector.aligned_base_folder(
        Path(base), config.model, section, config.data, config.seed
    )
    if (folder / "config.json").exists():
        logger.info("stage 1 is done: aligned base %s", folder)
        return folder
    logger.info("stage 1: aligning the projector of %s", base)
    style = section.prompt_style or config.model.prompt_style
    # what is saved here is the base of stage 2, whose float weights QMiLoRA needs
    update = {"prompt_style": style, "quantization": None}
    vlm = load_model(config.model.model_copy(update=update), base)
    files = section.train or config.data.train
    conversations = [
        item for file in files for item in load_conversations(config.data, file, config.data.limit)
    ]
    projector.align_projector(
        vlm,
        section,
        config.data,
        build_dataset(vlm, config.data, conversations),
        build_arguments(section.training, run_folder / "alignment", config.seed),
        metrics_file=run_folder / "metrics.jsonl",
    )
    return projector.save_base(vlm, folder)


def evaluate_once(
    vlm: VLM, config: Config, folder: Path, arguments: TrainingArguments, adapter_name: str | None
) -> dict[str, Any]:
    """Evaluate into ``folder``, or return the results that an earlier call left there."""
    if (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with autocast_as(arguments, vlm.model):
        return evaluate(
            vlm,
            config.eval.benches,
            config.eval.data_dir,
            folder,
            batch_size=config.eval.batch_size,
            limit=config.eval.limit,
            blind=config.eval.blind,
            model_name=vlm.path,
            adapter_name=adapter_name,
        )


def evaluate_before(
    vlm: VLM, config: Config, folder: Path, arguments: TrainingArguments
) -> dict[str, Any]:
    """Evaluate the base; for a base in the cache the answers are kept there for the next run.

    They depend on base, benches and settings alone; the key is a digest of these.
    """
    base, data_dir = Path(vlm.path).resolve(), Path(config.eval.data_dir)
    manifest = data_dir / "manifest.json"
    if not base.is_relative_to(cache_folder().resolve()) or not manifest.exists():
        return evaluate_once(vlm, config, folder, arguments, None)
    facts = [base.name, config.eval.model_dump(), config.model.model_dump(), sha256_of(manifest)]
    facts += [arguments.bf16, arguments.fp16, installed_versions()]
    facts += [BENCHES[name].VERSION for name in bench_names(config.eval.benches)]
    facts.append(forgetting.VERSION)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    kept = cache_folder() / "evaluations" / f"{base.name}-{digest[:12]}"
    if not (folder / "results.json").exists():
        evaluate_once(vlm, config, kept, arguments, None)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def run_pipeline(config: Config, run_folder: Path) -> dict[str, Any]:
    """Do the whole job; what an interrupted earlier call finished is not done again.

    Args:
        config: The settings.
        run_folder: Where everything goes; see the README for its files.

    Returns:
        ``{"before": results, "after": results, "base": path or id}``, results as in
        ``results.json`` (empty without benches).

    Raises:
        ConfigError: If the settings cannot be used or the folder holds another run.
    """
    check_names(config)
    check_data(config)
    claim_run_folder(config, run_folder)
    config = with_precisions(config, record_environment(config, run_folder / "environment.json"))
    set_seed(config.seed)
    arguments = build_arguments(config.training, run_folder / "checkpoints", config.seed)
    started = time.perf_counter()
    base = prepare_base(config, run_folder)
    vlm = load_model(config.model, base)
    datasets = [
        build_dataset(vlm, config.data, load_conversations(config.data, file, config.data.limit))
        for file in config.data.train
    ]
    dataset = (
        mixture(datasets, [1] * len(datasets), config.seed) if len(datasets) > 1 else datasets[0]
    )
    validation = None
    if config.data.validation:
        records = load_conversations(
            config.data, config.data.validation, config.data.validation_limit
        )
        validation = build_dataset(vlm, config.data, records)
    before: dict[str, Any] = {}
    if config.eval.benches:
        before = evaluate_before(vlm, config, run_folder / "eval_before", arguments)
    set_seed(config.seed)  # the same training whether or not the stages before were cached
    tuned = finetune(
        vlm,
        config.adapter,
        dataset,
        validation,
        arguments,
        run_folder=run_folder,
        projector=config.projector,
    )
    after: dict[str, Any] = {}
    if config.eval.benches:
        adapter = str(run_folder / "adapter")
        after = evaluate_once(tuned, config, run_folder / "eval_after", arguments, adapter)
    results = {"before": before, "after": after}
    write_json_atomic(run_folder / "results.json", results)
    write_report(run_folder)
    logger.info("done in %.1f min", (time.perf_counter() - started) / 60)
    return {**results, "base": str(base)}
