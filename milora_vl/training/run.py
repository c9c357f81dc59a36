"""Train one stage, or finetune with an adapter: plain arguments in, a finished folder out."""

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.portable import WEIGHTS_FILE, check_files, read_milora_file, read_tensors_
from milora_vl.adapter.state import recall
from milora_vl.adapter.tuned import describe_inputs
from milora_vl.adapter.update_size import UpdateMeter
from milora_vl.config import ConfigError, MiloraConfig, ProjectorSection
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.records import DataError
from milora_vl.files import write_json_atomic
from milora_vl.model.load import VLM
from milora_vl.runtime import is_main_process, process_count, wait_for_all
from milora_vl.training.callbacks import (
    AlreadyDone,
    BestStep,
    CheckpointKeeper,
    MetricsWriter,
    NothingLeftToTrain,
    SkippedSteps,
    WholeParameters,
)
from milora_vl.training.decay import DecayToStart, check_decay
from milora_vl.training.inputs import build_collate
from milora_vl.training.resume import (
    FACTS_FILE,
    check_finite_file,
    choose_checkpoint,
    compare_facts,
    describe_base,
    describe_data,
)
from milora_vl.training.stop import StopOnSigterm
from milora_vl.training.trainer import VlmTrainer, check_some_steps, supervised_positions
from milora_vl.training.watch import NonFiniteError

logger = logging.getLogger(__name__)


def train(  # noqa: PLR0913  settings by keyword
    model: nn.Module,
    vlm: VLM,
    dataset: Dataset,
    validation: Dataset | None,
    arguments: TrainingArguments,
    *,
    save_weights: Callable[[Path], None],
    metrics_file: Path,
    stage: str,
    projector: ProjectorSection,
    load_weights: Callable[[Path], None] | None = None,
    checkpoint: Path | None = None,
    measure: Callable[[int], Mapping[str, float]] | None = None,
    measure_every: int | None = None,
    details: Callable[[], Mapping[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train what requires a gradient, from its present values on.

    Args:
        model: The module; ``vlm.model``, or that with an adapter.
        vlm: Its processor makes the batches.
        dataset: What to learn.
        validation: What the validation loss is computed on.
        arguments: From ``build_arguments``.
        save_weights: Writes the trained weights into a folder that it makes or replaces whole.
        metrics_file: The JSONL file of losses and scores.
        stage: Name in the metrics and the log.
        projector: Its learning rate.
        load_weights: Reads what ``save_weights`` wrote, for the best checkpoint.
        checkpoint: The one the model's weights are from; optimizer and step are restored from it.
        measure: Scores at a step, name -> score; written to the metrics as ``eval_`` and name.
        measure_every: Steps between two calls of ``measure``.
        details: Measured by the main process at every logged loss, for the metrics file.
        callbacks: More of them.

    Raises:
        StoppedError: After SIGTERM, when a checkpoint of the last step is written.
        NonFiniteError: If a loss, a gradient or a trained tensor is not finite.
        ConfigError: If there is no step to train, or nothing to evaluate on.
    """
    check_some_steps(len(dataset), arguments)
    if arguments.eval_strategy != "no" and validation is None and measure is None:
        raise ConfigError(
            f"training.eval_strategy: {arguments.eval_strategy.value} of stage {stage}: there is "
            "nothing to evaluate on"
        )
    if checkpoint:
        logger.info("%s: going on from %s", stage, checkpoint)
    metrics = MetricsWriter(metrics_file, stage, details)
    best = BestStep(getattr(arguments, "early_stopping_patience", None))

    def run_once() -> VlmTrainer:
        trainer = VlmTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=validation,
            data_collator=build_collate(vlm),
            save_weights=save_weights,
            load_weights=load_weights,
            projector_learning_rate=projector.learning_rate,
            measure=measure,
            measure_every=measure_every,
            callbacks=[metrics, best, AlreadyDone(best), *callbacks],
        )
        trainer.add_callback(CheckpointKeeper(limit))
        trainer.add_callback(SkippedSteps(trainer.watch))
        try:
            _train_to_the_end(trainer, checkpoint)
        except NonFiniteError as error:
            if is_main_process():
                step = trainer.state.global_step
                metrics.write({"stage": stage, "step": step, "stopped": str(error)})
            raise
        return trainer

    # old checkpoints are deleted by CheckpointKeeper, never by transformers
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    try:
        may_split = arguments.auto_find_batch_size and arguments.per_device_train_batch_size > 1
        trainer = _fit_batch(run_once, model, arguments) if may_split else run_once()
    finally:
        arguments.save_total_limit = limit
    trainer.rest_optimizer()
    trainer.check_finite(f"the result of stage {stage}")
    # the Trainer wraps forward in autocast; what follows runs the model as it is
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def _train_to_the_end(trainer: VlmTrainer, checkpoint: Path | None) -> None:
    """Run the loop; leave the best weights in the model if they are asked for."""
    stop = StopOnSigterm()
    trainer.add_callback(stop)
    trainer.add_callback(WholeParameters())
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NothingLeftToTrain:
        logger.info("%s is the last step of its training", checkpoint)
        trainer.deliver_best()
    finally:
        stop.give_back()
    stop.check()


def _fit_batch(
    run_once: Callable[[], VlmTrainer], model: nn.Module, arguments: TrainingArguments
) -> VlmTrainer:
    """Split the batch into more parts until it fits; a step has as many samples as before.

    A step that ran out of memory half-way leaves weights that moved, so they are put back.
    """
    # on the CPU: device memory is what is short
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()
             if p.requires_grad}  # fmt: skip
    # transformers would split batches too, but with fewer samples a step
    arguments.auto_find_batch_size = False
    while True:
        try:
            return run_once()
        except RuntimeError as error:  # torch's out-of-memory errors are of several kinds
            size = arguments.per_device_train_batch_size
            if size == 1 or not should_reduce_batch_size(error):
                raise
        gc.collect()  # the traceback held the activations
        clear_device_cache()
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        smaller = max(part for part in range(1, size) if size % part == 0)
        arguments.per_device_train_batch_size = smaller
        arguments.gradient_accumulation_steps *= size // smaller
        logger.warning(
            "a batch of %d does not fit into memory: %d at a time, accumulated %d times",
            *(size, smaller, arguments.gradient_accumulation_steps),
        )


def check_adapter_files(folder: Path) -> None:
    """Check that a saved adapter is whole and finite.

    Raises:
        OSError: If a file is missing.
        ValueError: If one is damaged, or a tensor is not finite.
    """
    check_files(folder, read_milora_file(folder))
    check_finite_file(folder / WEIGHTS_FILE)


def finetune(  # noqa: PLR0913  settings by keyword
    vlm: VLM,
    adapter: MiloraConfig,
    dataset: ConversationDataset,
    validation: ConversationDataset | None,
    arguments: TrainingArguments,
    *,
    run_folder: Path,
    projector: ProjectorSection,
    data_facts: Mapping[str, Any] | None = None,
    measure: Callable[[PeftModel, int], Mapping[str, float]] | None = None,
    measure_every: int | None = None,
) -> VLM:
    """Stage 2: attach the adapter (or restore it), train, write ``adapter/``.

    Args:
        vlm: The base model.
        adapter: How the adapter is made.
        dataset: What to learn.
        validation: What the validation loss is computed on.
        arguments: From ``build_arguments``.
        run_folder: For the adapter, its certificate, checkpoints and metrics.
        projector: Its learning rate.
        data_facts: What identifies the data, compared when the run is resumed; default: from
            ``dataset``.
        measure: Scores of the model at a step; see ``train``.
        measure_every: Steps between two calls of ``measure``.

    Returns:
        The model with its trained adapter, in eval mode.

    Raises:
        ResumeError: If there are checkpoints but none is usable, or data or base are not those that
            the run began with.
    """
    final = run_folder / "adapter"
    if (final / "milora.json").exists():
        logger.info("the adapter is trained: %s", final)
        trained = load_adapter(vlm.model, final, weights=vlm.float_weights, together=True)
        return vlm.with_model(trained.eval())
    if adapter.decay_to_start:
        check_decay(arguments)
    check_some_steps(len(dataset), arguments)  # before minutes of decompositions
    regardless = getattr(arguments, "resume_regardless", False)
    checkpoint = choose_checkpoint(
        Path(arguments.output_dir),
        check_adapter_files,
        n_processes=process_count(),
        named=arguments.resume_from_checkpoint,
        regardless=regardless,
    )
    facts = {
        "data": dict(data_facts or describe_data([dataset])),
        "base": describe_base(vlm.model),
    }
    compare_facts(run_folder / FACTS_FILE, facts, checkpoint is not None, regardless)
    if checkpoint:
        peft_model = load_adapter(
            vlm.model,
            checkpoint / "adapter",
            trainable=True,
            weights=vlm.float_weights,
            strict_base=not regardless,
            together=True,
        )
    else:
        peft_model = _attach(vlm, adapter, dataset, arguments, run_folder)
    if arguments.weight_decay and recall(peft_model).has_anchor:
        logger.warning(
            "training.weight_decay: %g pulls the factors to zero, and with them the part of the "
            "pretrained weights that they started from; the published method has 0, and "
            "adapter.decay_to_start lets them decay to their start",
            arguments.weight_decay,
        )
    pads = None if dataset.transform is None else dataset.transform.background is not None
    shown = dataset.video_sampling if any(one.videos for one in dataset.conversations) else None
    save = partial(
        save_adapter,
        peft_model,
        base=vlm.path,
        processor=vlm.processor,
        inputs=describe_inputs(vlm, pad_to_square=pads, video_sampling=shown),
    )
    train(
        peft_model,
        vlm,
        dataset,
        validation,
        arguments,
        save_weights=save,
        load_weights=lambda folder: read_tensors_(peft_model, recall(peft_model), folder),
        metrics_file=run_folder / "metrics.jsonl",
        stage="finetune",
        projector=projector,
        checkpoint=checkpoint,
        measure=measure and partial(measure, peft_model),
        measure_every=measure_every,
        details=UpdateMeter(peft_model).measure if is_main_process() else None,
        callbacks=[DecayToStart(adapter.decay_to_start)] if adapter.decay_to_start else (),
    )
    if is_main_process():  # all processes hold the same weights
        save(final)
    wait_for_all()
    return vlm.with_model(peft_model.eval())


def _attach(
    vlm: VLM,
    adapter: MiloraConfig,
    dataset: ConversationDataset,
    arguments: TrainingArguments,
    run_folder: Path,
) -> PeftModel:
    """Make the adapter and its certificate."""
    collate, device = build_collate(vlm), vlm.model.device
    batch = _first_batches(dataset, collate, 2, device)[0]
    # the certificate needs the logits of answers only; those of all tokens may not fit
    batch["logits_to_keep"] = supervised_positions(batch.pop("labels"))
    calibration = None
    if adapter.init == "null_space":
        size = arguments.per_device_train_batch_size
        count = size * adapter.calibration_batches
        calibration = _first_batches(dataset, collate, size, device, count)
    peft_model, certificate = attach_milora(
        vlm.model,
        adapter,
        batch=batch,
        calibration=calibration,
        weights=vlm.float_weights,
    )
    if is_main_process():
        facts = json.loads(certificate.to_json())
        write_json_atomic(run_folder / "certificate.json", facts)
    logger.info("init certificate\n%s", certificate.summary())
    return peft_model


def _first_batches(
    dataset: ConversationDataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    size: int,
    device: torch.device,
    count: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Return the first ``count`` readable samples (default: one batch) as batches on ``device``.

    Raises:
        ValueError: If no sample can be read.
    """
    every = (dataset[index] for index in range(len(dataset)))
    readable = (sample for sample in every if not sample.get("skipped"))
    samples = list(islice(readable, count or size))
    if not samples:
        raise DataError("no image of the training data can be read; check data.image_folder")
    batches = [collate(samples[at : at + size]) for at in range(0, len(samples), size)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]
