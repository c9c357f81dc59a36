"""Samples -> one padded batch.

Mask and labels come from the samples' lengths, never from ids: many tokenizers pad with their end
token, and an end token has to be learned.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from milora_vl.constants import IGNORE_INDEX
from milora_vl.data.encode import compute_branch_inputs


def pad_batch(
    samples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    side: Literal["right", "left"] = "right",
    fill_rows: bool = False,
) -> dict[str, Tensor]:
    """Pad samples to one length.

    Args:
        samples: Each has ``input_ids``, may have ``labels`` (both of one length, lists or tensors)
            and ``pixel_values`` [n_images, 3, H, W], and ``branches`` (see ``side_by_side``); or,
            by the model's argument names, ``image_inputs`` (joined along the first axis) and
            ``token_inputs`` (first axis T). Samples with ``skipped`` are dropped.
        pad_token_id: Fills ``input_ids``; it may equal the end token.
        side: Where padding goes: "right" to train, "left" to generate.
        fill_rows: The first axis of ``image_inputs`` is the sample, so one without images gets a
            row of zeros beside one with images.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``: int64 [B, T] (``labels`` only if the samples
        have them), and ``pixel_values`` [N, 3, H, W], all images of the batch in order; or the
        ``image_inputs`` and ``token_inputs`` of all samples, padded with zeros. With branches
        ``attention_mask`` is float32 [B, 1, T, T], 0 where a token may look and the lowest float
        elsewhere, and ``position_ids`` int64 [B, T] count on from the shared beginning.
        If all samples are skipped, the batch is the first of them: one token without a label.

    Raises:
        ValueError: If there is no sample, or labels are missing in some or differ in length.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left", not {side!r}')
    # a model cannot run on no row, and other processes wait for this one's step
    samples = [sample for sample in samples if not sample.get("skipped")] or [samples[0]]
    lengths = [len(sample["input_ids"]) for sample in samples]
    width = max(lengths)
    shape = (len(samples), width)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    if any("labels" in sample for sample in samples):
        batch["labels"] = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        real = slice(0, length) if side == "right" else slice(width - length, width)
        # from lengths: padding may use the end token, which is real elsewhere
        batch["input_ids"][row, real] = torch.as_tensor(sample["input_ids"], dtype=torch.long)
        batch["attention_mask"][row, real] = 1
        if "labels" in batch:
            batch["labels"][row, real] = _checked_labels(sample, length, row)
    images = [x["pixel_values"] for x in samples if x.get("pixel_values") is not None]
    if images:
        batch["pixel_values"] = torch.cat(images)  # [N, 3, H, W]
    batch |= _join_images([sample.get("image_inputs") or {} for sample in samples], fill_rows)
    batch |= _pad_tokens([sample.get("token_inputs") or {} for sample in samples], width, side)
    return batch | _branch_inputs(samples, width, side)


def _branch_inputs(
    samples: Sequence[Mapping[str, Any]], width: int, side: str
) -> dict[str, Tensor]:
    if not any(sample.get("branches") for sample in samples):
        return {}
    if side != "right":
        raise ValueError("branches are for training; they are padded on the right")
    rows = [torch.as_tensor(x.get("branches") or [0] * len(x["input_ids"])) for x in samples]
    return compute_branch_inputs(rows, width)


def _join_images(rows: list[Mapping[str, Tensor]], fill_rows: bool) -> dict[str, Tensor]:
    """Join by name along the first axis; the other axes are padded with zeros to the largest."""
    joined = {}
    for name in {name: None for row in rows for name in row}:  # in order, once
        present = [row[name] for row in rows if name in row]
        largest = [max(sizes) for sizes in zip(*(one.shape[1:] for one in present), strict=True)]
        # [videos, frames, 3, H, W]: a model would take black frames for frames of the video
        if name == "pixel_values_videos" and len({one.shape[1] for one in present}) > 1:
            raise ValueError(
                "videos of one batch have different numbers of frames, which this model cannot "
                "take; leave data.video_fps unset, or train with batches of one"
            )
        # Mllama cross-attends by row, so a row without images needs a place among those that have
        empty = present[0].new_zeros((1, *largest))
        parts = [_grown(row[name], largest) if name in row else empty for row in rows]
        joined[name] = torch.cat(
            [part for part, row in zip(parts, rows, strict=True) if fill_rows or name in row]
        )
    return joined


def _grown(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Pad all axes but the first with zeros at their end."""
    grown = tensor.new_zeros((len(tensor), *sizes))
    grown[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return grown


def _pad_tokens(
    rows: list[Mapping[str, Tensor]], width: int, side: Literal["right", "left"]
) -> dict[str, Tensor]:
    """Stack by name to [B, T, ...] with zeros in padding and for samples without the name."""
    padded = {}
    for name in {name: None for row in rows for name in row}:
        present = [row[name] for row in rows if name in row]
        largest = [max(sizes) for sizes in zip(*(one.shape[1:] for one in present), strict=True)]
        padded[name] = present[0].new_zeros((len(rows), width, *largest))
        for row, place in zip(rows, padded[name], strict=True):
            if name in row:
                one = _grown(row[name], largest)
                start = 0 if side == "right" else width - len(one)
                place[start : start + len(one)] = one
    return padded


def _checked_labels(sample: Mapping[str, Any], length: int, row: int) -> Tensor:
    labels = sample.get("labels")
    if labels is None or len(labels) != length:
        found = "none" if labels is None else len(labels)
        raise ValueError(f"sample {row} of the batch has {length} input_ids but {found} labels")
    return torch.as_tensor(labels, dtype=torch.long)
