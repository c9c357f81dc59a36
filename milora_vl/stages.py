"""The stages of the main job: plain arguments in, files out, and nothing done twice.

For each stage a function ``..._is_done`` or ``..._is_trained`` looks whether its files exist. In a
job of several processes all of them call every stage; the main process writes the job's files while
the others wait.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

import milora_vl
from milora_vl.adapter.portable import installed_versions
from milora_vl.config import (
    AlignmentSection,
    DataSection,
    EvalSection,
    MiloraConfig,
    ModelSection,
    ProjectorSection,
)
from milora_vl.data.dataset import mix
from milora_vl.data.records import DataError
from milora_vl.eval import forgetting
from milora_vl.eval.benches import BENCHES
from milora_vl.eval.evaluation import bench_names, evaluate
from milora_vl.eval.report import write_report
from milora_vl.files import cache_folder, sha256_of, write_json_atomic
from milora_vl.model.embedded import cached_demo_base, demo_base_folder
from milora_vl.model.load import VLM
from milora_vl.runtime import (
    autocast_as,
    from_main_process,
    gather_json,
    is_local_main_process,
    is_main_process,
    main_process_first,
    wait_for_all,
)
from milora_vl.training import projector
from milora_vl.training.arguments import build_arguments
from milora_vl.training.inputs import build_dataset, load_conversations, load_model
from milora_vl.training.run import finetune

logger = logging.getLogger(__name__)


def missing_files(files: Sequence[str | None]) -> list[str]:
    """Return the names of files that do not exist; None is skipped."""
    return [name for name in files if name and not Path(name).exists()]


def prepare_data(command: str | None, files: Sequence[str | None]) -> None:
    """Run the command that makes a config's files.

    Args:
        command: As in a terminal, run in the repository's folder; it returns at once if the files
            exist. None: the user provides them.
        files: What must exist afterwards.

    Raises:
        DataError: If the command fails, or a file is missing.
    """
    with main_process_first(local=True) as is_first:
        if command and is_first:
            root = Path(milora_vl.__file__).parents[1]
            _run_command("data.prepare", command, root)
    if missing := missing_files(files):
        made_by = f"`{command}` did not make it" if command else "no data.prepare makes it"
        raise DataError(
            f"{missing[0]}: not found, and {made_by}. Put it there, correct its path (data.train, "
            "data.validation, data.image_folder, or eval.data_dir; eval.benches=[] skips the "
            "benches), or set data.prepare to the command that makes it"
        )


def prepare_model(command: str | None, path: str) -> None:
    """Run the command that makes the folder of the base model, if it does not exist.

    Args:
        command: As in a terminal, run in the current folder; None: ``path`` is loaded as it is.
        path: What must exist afterwards.

    Raises:
        DataError: If the command fails or makes something else.
    """
    if command is None:
        return
    with main_process_first(local=True) as is_first:
        if is_first and not Path(path).exists():
            logger.info("model.prepare: %s", command)
            _run_command("model.prepare", command, Path.cwd())
    if not Path(path).exists():
        raise DataError(f"model.path: {path} is not what model.prepare makes (`{command}`)")


def _run_command(key: str, command: str, folder: Path) -> None:
    words = shlex.split(os.path.expandvars(command))
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0] == "milora-vl":  # a batch job may lack it on its PATH
        words[:1] = [sys.executable, "-m", "milora_vl"]
    done = subprocess.run(words, cwd=folder, check=False)
    if done.returncode != 0:
        raise DataError(f"{key}: `{command}` ended with code {done.returncode}, see above")


def base_is_done(
    model: ModelSection, alignment: AlignmentSection | None, data: DataSection, seed: int
) -> bool:
    """Return whether the base model of stage 2 exists already."""
    if model.path == "demo":
        base = demo_base_folder(model.image_size_px, model.vision_feature_layer)
        if not (base / "config.json").exists():
            return False
    else:
        base = Path(model.path)
    if alignment is None:
        return True
    if missing_files([*data.train, *alignment.train]):
        return False
    folder = projector.aligned_base_folder(base, model, alignment, data, seed)
    return (folder / "config.json").exists()


def prepare_base(
    model: ModelSection,
    alignment: AlignmentSection | None,
    data: DataSection,
    seed: int,
    run_folder: Path,
) -> Path | str:
    """Return the base model of stage 2: as named, composed, or composed and aligned (cached)."""
    base: Path | str = model.path
    if base == "demo":
        with main_process_first(local=True):
            base = cached_demo_base(model.image_size_px, model.vision_feature_layer)
    if alignment is None:
        return base
    folder = projector.aligned_base_folder(Path(base), model, alignment, data, seed)
    # all processes must agree: training needs every one, also those with the result in their cache
    if all(gather_json((folder / "config.json").exists())):
        logger.info("stage 1 is done: aligned base %s", folder)
        return folder
    logger.info("stage 1: aligning the projector of %s", base)
    style = alignment.prompt_style or model.prompt_style
    # the result is the base of stage 2, and QMiLoRA needs its float weights
    update = {"prompt_style": style, "quantization": None}
    vlm = load_model(model.model_copy(update=update), base)
    files = alignment.train or data.train
    conversations = [item for file in files for item in load_conversations(data, file, data.limit)]
    projector.align_projector(
        vlm,
        alignment,
        data,
        build_dataset(vlm, data, conversations),
        build_arguments(alignment.training, run_folder / "alignment", seed),
        metrics_file=run_folder / "metrics.jsonl",
    )
    if is_local_main_process():  # every computer keeps its own
        projector.save_base(vlm, folder)
    wait_for_all()
    return folder


def evaluation_is_done(folder: Path) -> bool:
    """Return whether an evaluation is complete."""
    return (folder / "results.json").exists()


def evaluate_stage(
    get_vlm: Callable[[], VLM],
    section: EvalSection,
    folder: Path,
    arguments: TrainingArguments,
    *,
    adapter_name: str | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Evaluate into ``folder``, or return the results that an earlier call left there.

    Args:
        get_vlm: Returns the model; called only if it is needed.
        section: Which benches, and how.
        folder: For ``results.json`` and ``predictions.jsonl``.
        arguments: Of training, whose mixed precision is used.
        adapter_name: Recorded in the results.
        kept: Folder that keeps the results for other runs; see ``kept_evaluation``.

    Returns:
        The results; empty without benches.
    """
    if not section.benches:
        return {}
    if not all(gather_json(evaluation_is_done(folder))):
        place = kept or folder
        if not all(gather_json(evaluation_is_done(place))):
            vlm = get_vlm()
            with autocast_as(arguments, vlm.model):
                evaluate(
                    vlm,
                    section.benches,
                    section.data_dir,
                    place,
                    batch_size=section.batch_size,
                    limit=section.limit,
                    blind=section.blind,
                    model_name=vlm.path,
                    adapter_name=adapter_name,
                )
            wait_for_all()
        if kept and is_main_process():
            shutil.copytree(kept, folder, dirs_exist_ok=True)
        wait_for_all()
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def kept_evaluation(
    base: Path | str,
    model: ModelSection,
    section: EvalSection,
    arguments: TrainingArguments,
    *,
    pads: bool = True,
) -> Path | None:
    """Return the cache folder of a base's evaluation, or None for a base outside the cache.

    The answers depend only on base, benches and settings; the folder's name is a digest of these.
    """
    base, manifest = Path(base).resolve(), Path(section.data_dir) / "manifest.json"
    if not section.benches or not manifest.exists():
        return None
    if not base.is_relative_to(cache_folder().resolve()):
        return None
    during = {"every_steps", "during_limit"}
    asked = model.model_dump(exclude={"prompt_day"})  # a new day needs no new evaluation
    facts = [base.name, section.model_dump(exclude=during), asked, sha256_of(manifest)]
    facts += [arguments.bf16, arguments.fp16, installed_versions()]
    facts += [] if pads else ["images are not padded"]
    facts += [BENCHES[name].VERSION for name in bench_names(section.benches)]
    facts.append(forgetting.VERSION)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "evaluations" / f"{base.name}-{digest[:12]}"


def adapter_is_trained(run_folder: Path) -> bool:
    """Return whether the final adapter is complete."""
    return (run_folder / "adapter" / "milora.json").exists()


def finetune_stage(
    vlm: VLM,
    adapter: MiloraConfig,
    data: DataSection,
    arguments: TrainingArguments,
    *,
    run_folder: Path,
    projector_section: ProjectorSection,
    evaluation: EvalSection | None = None,
) -> VLM:
    """Attach the adapter and train it, or load the one that is trained; see ``finetune``.

    Args:
        vlm: The base model.
        adapter: How the adapter is made.
        data: What to train and validate on.
        arguments: From ``build_arguments``.
        run_folder: For all that the training writes.
        projector_section: The projector's learning rate.
        evaluation: Benches to ask during training, if its ``every_steps`` is set.
    """
    dataset, validation = build_training_data(vlm, data, arguments.seed)
    during = evaluation is not None and evaluation.every_steps and evaluation.benches
    set_seed(arguments.seed)  # so that cached earlier stages do not change the training
    return finetune(
        vlm,
        adapter,
        dataset,
        validation,
        arguments,
        run_folder=run_folder,
        projector=projector_section,
        data_facts=describe_files(data),
        measure=partial(ask_during, vlm, evaluation, run_folder) if during else None,
        measure_every=evaluation.every_steps if during else None,
    )


def describe_files(data: DataSection) -> dict[str, Any]:
    """Return what identifies the training data: the content of its files, and the limit.

    Skipped records and images do not count, because their handling may change.
    """
    return {"sha256": [sha256_of(file) for file in data.train], "limit": data.limit}


def ask_during(
    vlm: VLM, section: EvalSection, run_folder: Path, model: PeftModel, step: int
) -> dict[str, float]:
    """Return the benches' scores of a model in training, on a few questions each.

    Every process of the job calls it and answers its share of the questions.
    """
    place = run_folder / "eval_during" / f"step-{step}"
    results = evaluate(
        vlm.with_model(model),
        section.benches,
        section.data_dir,
        place,
        batch_size=section.batch_size,
        limit=section.during_limit,
        blind=False,
        model_name=vlm.path,
        adapter_name=f"step {step}",
        text_probe=False,
        progress=False,
    )
    found = {name: bench["score"] for name, bench in results.get("benches", {}).items()}
    # only the main process has the scores; benches with a judge have none yet
    return from_main_process({name: one for name, one in found.items() if one is not None})


def build_training_data(vlm: VLM, data: DataSection, seed: int) -> tuple[Dataset, Dataset | None]:
    """Read the records to train on, mixed if there are several files, and those to validate on."""
    datasets = [
        build_dataset(vlm, data, load_conversations(data, file, data.limit)) for file in data.train
    ]
    dataset = mix(datasets, seed) if len(datasets) > 1 else datasets[0]
    if not data.validation:
        return dataset, None
    records = load_conversations(data, data.validation, data.validation_limit)
    return dataset, build_dataset(vlm, data, records)


def report_stage(run_folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json`` and the report; a report that fails does not fail the run."""
    if is_main_process():
        write_json_atomic(run_folder / "results.json", results)
        try:
            write_report(run_folder)
        except Exception as error:  # the run is complete without its page
            logger.warning("report.html was not written: %s: %s", type(error).__name__, error)
            logger.debug("report", exc_info=True)
    wait_for_all()
