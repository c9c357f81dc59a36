"""What a stage trains with: model, records, samples and batches, each from its own section."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from milora_vl.config import DataSection, ModelSection
from milora_vl.data.collate import pad_batch
from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.images import ImageTransform
from milora_vl.data.records import Conversation, DataError, read_records
from milora_vl.data.videos import FrameSampling
from milora_vl.model.families import check_side_by_side
from milora_vl.model.load import VLM, load_vlm

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
        prompt_day=section.prompt_day,
        trust_remote_code=section.trust_remote_code,
        allow_pickle=section.allow_pickle,
        quantization=section.quantization,
    )


def load_conversations(
    section: DataSection, file: str, limit: int | None = None
) -> list[Conversation]:
    """Read one record file by the section's rules; skipped records are counted and logged."""
    conversations, skipped = read_records(
        file,
        section.image_folder or None,
        section.on_bad_record,
        section.ignore_keys,
        must_exist=section.on_bad_image == "error",  # else the data set skips missing ones
    )
    for reason, count in skipped.items():
        logger.warning("%s: %d records skipped: %s", file, count, reason)
    return conversations[:limit]


def build_dataset(
    vlm: VLM, section: DataSection, conversations: list[Conversation]
) -> ConversationDataset:
    """Bind conversations to a model's processor and prompt style.

    Raises:
        ValueError: If records have images and the model is a text model, or exchanges are to be
            learned side by side and the model's attention does not allow it.
    """
    if section.turns == "side_by_side":
        check_side_by_side(vlm.model, section.max_length)
    with_image = next((one for one in conversations if one.images or one.videos), None)
    if with_image and not vlm.has_vision:
        raise DataError(f"{with_image.where}: has images, but {vlm.path} is a text model")
    plain = vlm.has_vision and not vlm.image_reader
    return ConversationDataset(
        conversations,
        section.image_folder or None,
        ImageTransform(vlm.processor.image_processor, section.pad_to_square) if plain else None,
        vlm.prompt_style,
        vlm.tokenizer,
        vlm.tokens_per_image,
        section.max_length,
        image_reader=vlm.image_reader,
        video_sampling=FrameSampling(section.video_frames, section.video_fps),
        on_bad_image=section.on_bad_image,
        on_bad_length=section.on_bad_record,
        special_tokens_in_answers=section.special_tokens_in_answers,
        side_by_side=section.turns == "side_by_side",
    )


def build_collate(vlm: VLM) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Return the collator of training batches."""
    tokenizer = vlm.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    fill_rows = vlm.image_reader is not None and vlm.image_reader.cross_attention
    return partial(pad_batch, pad_token_id=pad, fill_rows=fill_rows)
