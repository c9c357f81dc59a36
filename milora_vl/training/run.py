"""Config in, finished run folder out; every stage that is done is not done again."""

import json
import logging
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from milora_vl.adapter.attach import attach_milora
from milora_vl.adapter.checkpoint import load_adapter, save_adapter
from milora_vl.adapter.portable import installed_versions
from milora_vl.config import DataSection, MiloraConfig, ModelSection, ProjectorSection
from milora_vl.data.collate import pad_batch
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.images import build_image_transform
from milora_vl.data.records import Conversation, read_records
from milora_vl.files import write_json_atomic
from milora_vl.model.families import check_side_by_side
from milora_vl.model.load import VLM, load_vlm
from milora_vl.training.trainer import (
    MetricsWriter,
    VlmTrainer,
    last_checkpoint,
    supervised_positions,
)

logger = logging.getLogger(__name__)

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(section: ModelSection, path: Path | str | None = None) -> VLM:
    """Load the model that a config names, or another checkpoint with the same settings."""
    return load_vlm(
        path or section.path,
        dtype=DTYPES[section.dtype],
        device=section.device,
        revision=section.revision,
        attn_implementation=section.attn_implementation,
        prompt_style=section.prompt_style,
        trust_remote_code=section.trust_remote_code,
        allow_pickle=section.allow_pickle,
        quantization=section.quantization,
    )


def load_conversations(
    section: DataSection, file: str, limit: int | None = None
) -> list[Conversation]:
    """Read one record file by the section's rules; what is left out is counted and logged."""
    conversations, skipped = read_records(file, section.image_folder or None, section.on_bad_record)
    for reason, count in skipped.items():
        logger.warning("%s: %d records left out: %s", file, count, reason)
    return conversations[:limit]


def build_dataset(
    vlm: VLM, section: DataSection, conversations: list[Conversation]
) -> ConversationDataset:
    """Bind conversations to a model's processor and prompt style.

    Raises:
        ValueError: If records have pictures and the model is a text model, or exchanges are to be
            learnt side by side and the model's attention does not allow it.
    """
    if section.turns == "side_by_side":
        check_side_by_side(vlm.model, section.max_length)
    with_image = next((one for one in conversations if one.images), None)
    if with_image and not vlm.sees:
        raise ValueError(f"{with_image.where}: has images, but {vlm.path} is a text model")
    plain = vlm.sees and not vlm.pictures
    return ConversationDataset(
        conversations,
        section.image_folder or None,
        build_image_transform(vlm.processor.image_processor, section.pad_to_square)
        if plain
        else None,
        vlm.prompt_style,
        vlm.tokenizer,
        vlm.tokens_per_image,
        section.max_length,
        pictures=vlm.pictures,
        on_bad_image=section.on_bad_image,
        on_bad_length=section.on_bad_record,
        side_by_side=section.turns == "side_by_side",
    )


def build_collate(vlm: VLM) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Return the collator of training batches."""
    tokenizer = vlm.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    fill_rows = vlm.pictures is not None and vlm.pictures.cross_attention
    return partial(pad_batch, pad_token_id=pad, fill_rows=fill_rows)


def build_arguments(training: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """Turn a ``training`` section into ``TrainingArguments``.

    What the section does not say: checkpoints go to ``folder``, two are kept, no logging back-end,
    an epoch is the unit of evaluation and saving.

    Raises:
        ValueError: If transformers refuses a value.
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
    }
    return TrainingArguments(**(defaults | training))


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
    trainer = VlmTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation,
        data_collator=build_collate(vlm),
        save_weights=save_weights,
        projector_learning_rate=projector.learning_rate,
        callbacks=[MetricsWriter(metrics_file, stage)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(Path(arguments.output_dir))
    if checkpoint:
        logger.info("%s: going on from %s", stage, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
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
        write_json_atomic(run_folder / "certificate.json", json.loads(certificate.to_json()))
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
    save(final)
    return vlm.with_model(peft_model.eval())


def _first_batches(
    dataset: ConversationDataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    size: int,
    device: torch.device,
    count: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Return the first ``count`` samples (default: one batch) as batches on ``device``."""
    indices = range(min(count or size, len(dataset)))
    batches = [
        collate([dataset[index] for index in indices[start : start + size]])
        for start in range(0, len(indices), size)
    ]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


@contextmanager
def autocast_as(arguments: TrainingArguments, model: nn.Module) -> Iterator[None]:
    """Run the block in the mixed precision that training uses."""
    device = next(model.parameters()).device.type
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    with torch.autocast(device, dtype, enabled=bool(arguments.bf16 or arguments.fp16)):
        yield


def describe_environment(seed: int, data_manifest: Path | None) -> dict[str, Any]:
    """Collect what a result depends on: versions, commit, machine, seed, data."""

    def git(*words: str) -> str:
        try:
            result = subprocess.run(
                ["git", *words],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parent,
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        return result.stdout.strip()

    manifest = (
        json.loads(data_manifest.read_text(encoding="utf-8"))
        if data_manifest and data_manifest.exists()
        else None
    )
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": installed_versions(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "seed": seed,
        "data_manifest": manifest,
    }


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, so that a run can be repeated."""
    set_seed(seed)
