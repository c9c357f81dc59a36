"""Train one stage, or finetune with an adapter: plain arguments in, a finished folder out."""

import json
import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.portable import check_whole
from milora_vl.config import MiloraConfig, ProjectorSection
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.records import DataError
from milora_vl.files import write_json_atomic
from milora_vl.model.load import VLM
from milora_vl.runtime import is_main_process, wait_for_all
from milora_vl.training.inputs import build_collate
from milora_vl.training.resume import last_checkpoint
from milora_vl.training.stop import StopOnSigterm
from milora_vl.training.trainer import MetricsWriter, VlmTrainer, supervised_positions

logger = logging.getLogger(__name__)


class WholeParameters(TrainerCallback):
    """Ends a run whose parameters are sharded before its first step: none could be saved."""

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Check the model as it is distributed now."""
        check_whole(model)


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
) -> None:
    """Train what requires a gradient; go on from the last complete checkpoint if there is one."""
    if validation is None:
        arguments.eval_strategy = "no"
    stop = StopOnSigterm()
    trainer = VlmTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation,
        data_collator=build_collate(vlm),
        save_weights=save_weights,
        projector_learning_rate=projector.learning_rate,
        callbacks=[MetricsWriter(metrics_file, stage), stop],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(WholeParameters())
    checkpoint = last_checkpoint(Path(arguments.output_dir))
    if checkpoint:
        logger.info("%s: going on from %s", stage, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stop.check()
    # the Trainer wraps forward in autocast; what follows runs the model as it is
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def finetune(
    vlm: VLM,
    adapter: MiloraConfig,
    dataset: ConversationDataset,
    validation: ConversationDataset | None,
    arguments: TrainingArguments,
    *,
    run_folder: Path,
    projector: ProjectorSection,
) -> VLM:
    """Stage 2: attach the adapter (or restore it), train, write ``adapter/``.

    Returns:
        The model with its trained adapter, in eval mode.
    """
    final, checkpoints = run_folder / "adapter", Path(arguments.output_dir)
    checkpoint = last_checkpoint(checkpoints)
    if (final / "milora.json").exists():
        logger.info("the adapter is trained: %s", final)
        trained = load_adapter(vlm.model, final, weights=vlm.float_weights)
        return vlm.with_model(trained.eval())
    if checkpoint:
        peft_model = load_adapter(
            vlm.model, checkpoint / "adapter", trainable=True, weights=vlm.float_weights
        )
    else:
        collate, device = build_collate(vlm), vlm.model.device
        batch = _first_batches(dataset, collate, 2, device)[0]
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
    save = partial(save_adapter, peft_model, base=vlm.path, processor=vlm.processor)
    train(
        peft_model,
        vlm,
        dataset,
        validation,
        arguments,
        save_weights=save,
        metrics_file=run_folder / "metrics.jsonl",
        stage="finetune",
        projector=projector,
    )
    if is_main_process():  # all processes hold the same weights
        save(final)
    wait_for_all()
    return vlm.with_model(peft_model.eval())


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
    readable = (sample for sample in every if not sample.get("left_out"))
    samples = list(islice(readable, count or size))
    if not samples:
        raise DataError("no image of the training data can be read; check data.image_folder")
    batches = [collate(samples[at : at + size]) for at in range(0, len(samples), size)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]
