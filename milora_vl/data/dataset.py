"""Conversations + image folder -> training samples, one at a time; mixtures of data sets.

Order of samples in an epoch: batches of one modality and of similar true lengths.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from milora_vl.data.encode import Encoded, encode, encode_side_by_side
from milora_vl.data.images import (
    BadImageError,
    ProcessorPictures,
    load_image,
    read_image_size,
    resolve_image,
)
from milora_vl.data.prompts import PromptStyle
from milora_vl.data.records import Conversation


def group_by_length(
    lengths: Sequence[int],
    has_image: Sequence[bool],
    batch_size: int,
    seed: int,
    epoch: int = 0,
    window: int = 50,
) -> list[int]:
    """Order samples so that consecutive batches pad little and hold one modality.

    Samples are shuffled, cut into windows of ``window`` batches, sorted by length inside a window
    and cut into batches; then the batches are shuffled. The batch with the longest sample comes
    first, so that a lack of memory shows at the first step; left-over samples, the only batch that
    may mix modalities, come last.

    Args:
        lengths: True lengths in tokens, image tokens included.
        has_image: For each sample, whether it holds an image.
        batch_size: Samples a step takes over all devices.
        seed: Same seed and epoch, same order, on every machine.
        epoch: Changes the order from epoch to epoch.
        window: Batches sorted together; more pads less and shuffles less.

    Returns:
        A permutation of ``range(len(lengths))``.

    Raises:
        ValueError: If the two lists differ in length or ``batch_size`` or ``window`` is below 1.
    """
    if len(lengths) != len(has_image):
        raise ValueError(f"{len(lengths)} lengths but {len(has_image)} modality flags")
    if batch_size < 1 or window < 1:
        raise ValueError(f"batch_size and window must be at least 1: {batch_size}, {window}")
    generator = random.Random(f"{seed}/{epoch}")
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        members = [index for index, flag in enumerate(has_image) if bool(flag) == modality]
        generator.shuffle(members)
        whole = len(members) - len(members) % batch_size
        rest += members[whole:]
        for start in range(0, whole, window * batch_size):
            group = members[start : min(start + window * batch_size, whole)]
            group.sort(key=lambda index: lengths[index], reverse=True)
            batches += [group[at : at + batch_size] for at in range(0, len(group), batch_size)]
    generator.shuffle(batches)
    if batches:
        longest = max(range(len(batches)), key=lambda at: max(lengths[i] for i in batches[at]))
        batches[0], batches[longest] = batches[longest], batches[0]
    rest.sort(key=lambda index: lengths[index], reverse=True)
    return [index for batch in batches for index in batch] + rest


logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 100


@dataclass(eq=False)
class ConversationDataset(Dataset):
    """Conversations as encoded samples.

    An item is ``{"input_ids": list[int], "labels": list[int]}``, with images also
    ``"pixel_values"``: float32 [n_images, 3, H, W], side by side also ``"branches"``: list[int];
    with ``pictures`` instead of pixels what ``pad_batch`` calls ``image_inputs`` and
    ``token_inputs``.

    Attributes:
        conversations: Validated records.
        image_folder: Where image names start.
        transform: RGB picture -> float32 [3, H, W]; see ``build_image_transform``.
        style: Prompt style or its name.
        tokenizer: Holds the image token.
        tokens_per_image: Image tokens each picture takes in ``input_ids``; without ``pictures``.
        max_length: Longest sample in tokens, image tokens included; None for no limit.
        on_bad_image: Raise on an unreadable picture; or log and count it in ``skipped`` (of this
            process) and give the next readable sample in its place.
        on_bad_length: Raise, when it is encoded, on a record that ``max_length`` leaves without
            image or answer; or leave such records out at construction, counted in ``skipped``.
        side_by_side: Learn every exchange as if it were the only one of its conversation; see
            ``encode_side_by_side``.
        pictures: Reads pictures in place of ``transform`` and ``tokens_per_image``.
        cache_pixels: Keep pixel values in memory after the first reading (in each worker process).
        skipped: How many records or pictures were left out, by reason.
    """

    conversations: Sequence[Conversation]
    image_folder: Path | str | None
    transform: Callable[..., Tensor]
    style: PromptStyle | str
    tokenizer: PreTrainedTokenizerBase
    tokens_per_image: int
    max_length: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    on_bad_length: Literal["error", "skip"] = "error"
    side_by_side: bool = False
    pictures: ProcessorPictures | None = None
    cache_pixels: bool = False
    skipped: Counter[str] = field(default_factory=Counter)
    _pixels: dict[int, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the options and, if asked, leave out records that do not fit."""
        for name in ("on_bad_image", "on_bad_length"):
            if getattr(self, name) not in ("error", "skip"):
                raise ValueError(f'{name} must be "error" or "skip", not {getattr(self, name)!r}')
        if self.on_bad_length == "skip":
            self.conversations = [
                conversation for conversation in self.conversations if self._fits(conversation)
            ]
        if not self.conversations:
            raise ValueError(f"the data set is empty; left out: {dict(self.skipped) or 'nothing'}")

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample; see the class.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If the record does not fit ``max_length`` (naming it), or too many pictures
                in a row are unreadable.
            BadImageError: If a picture is unreadable and ``on_bad_image`` is "error".
        """
        index = range(len(self))[index]  # an index beyond the end must not wrap
        for step in range(min(_MAX_REPLACEMENTS, len(self))):
            at = (index + step) % len(self)
            try:
                pixel_values = self._read_pixels(at)
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                self.skipped["unreadable image"] += 1
                logger.warning("left out: %s", error)
                continue
            encoded = self.encode_at(at)
            sample = {"input_ids": encoded.input_ids, "labels": encoded.labels}
            if encoded.branches is not None:
                sample["branches"] = encoded.branches
            if self.pictures:
                images = pixel_values or {}
                tokens = self.pictures.token_inputs(encoded.input_ids, encoded.labels, images)
                return {**sample, "image_inputs": images, "token_inputs": tokens}
            return sample if pixel_values is None else {**sample, "pixel_values": pixel_values}
        raise ValueError(f"no readable picture from {self.conversations[index].where} on")

    def encode_at(self, index: int) -> Encoded:
        """Return ids and labels of one conversation; of pictures at most their size is read.

        Raises:
            ValueError: If it cannot be encoded; the message names the record.
            BadImageError: If a picture's size is needed and cannot be read.
        """
        return self._encode(self.conversations[index])

    @cached_property
    def lengths(self) -> list[int]:
        """True length of every sample in tokens, image tokens included; pictures are not read."""
        return [len(self.encode_at(index).input_ids) for index in range(len(self))]

    @cached_property
    def has_image(self) -> list[bool]:
        """Whether each sample holds an image."""
        return [bool(conversation.images) for conversation in self.conversations]

    def _encode(self, conversation: Conversation) -> Encoded:
        try:
            counts: list[Any] = [self.tokens_per_image] * len(conversation.images)
            if self.pictures:
                sizes = [read_image_size(path) for path in self._paths(conversation)]
                counts = self.pictures.expand(sizes)
            make = encode_side_by_side if self.side_by_side else encode
            return make(conversation.turns, self.style, self.tokenizer, counts, self.max_length)
        except ValueError as error:
            raise ValueError(f"{conversation.where or conversation.id}: {error}") from error

    def _fits(self, conversation: Conversation) -> bool:
        try:
            self._encode(conversation)
        except ValueError as error:
            self.skipped["does not fit max_length or style"] += 1
            logger.warning("left out: %s", error)
            return False
        return True

    def _paths(self, conversation: Conversation) -> list[Path]:
        if conversation.images and self.image_folder is None:
            raise ValueError(f"{conversation.where}: has images, but no image folder is given")
        return [resolve_image(self.image_folder, name) for name in conversation.images]

    def _read_pixels(self, index: int) -> Tensor | dict[str, Tensor] | None:
        conversation = self.conversations[index]
        if not conversation.images:
            return None
        if index in self._pixels:
            return self._pixels[index]
        try:
            pictures = [load_image(path) for path in self._paths(conversation)]
        except BadImageError as error:
            raise BadImageError(f"{conversation.where or conversation.id}: {error}") from error
        if self.pictures:
            pixel_values = self.pictures.read(pictures)
        else:
            pixel_values = torch.stack([self.transform(one) for one in pictures])  # [n, 3, H, W]
        if self.cache_pixels:
            self._pixels[index] = pixel_values
        return pixel_values


@dataclass(eq=False)
class Mixture(Dataset):
    """Samples of several data sets in a fixed order.

    Attributes:
        datasets: The parts.
        places: For each sample, (part, index in the part).
    """

    datasets: Sequence[ConversationDataset]
    places: list[tuple[int, int]]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at that place; see ``ConversationDataset``."""
        part, at = self.places[index]
        return self.datasets[part][at]

    @cached_property
    def lengths(self) -> list[int]:
        """True length of every sample in tokens, image tokens included."""
        return [self.datasets[part].lengths[at] for part, at in self.places]

    @cached_property
    def has_image(self) -> list[bool]:
        """Whether each sample holds an image."""
        return [self.datasets[part].has_image[at] for part, at in self.places]


def mixture(
    datasets: Sequence[ConversationDataset], weights: Sequence[float], seed: int
) -> Mixture:
    """Mix data sets, each taken ``weight`` times.

    Args:
        datasets: The parts.
        weights: How often each part is taken: 1 once, 2 twice, 0.5 a random half, 0 not at all.
        seed: Chooses the random shares and the order.

    Returns:
        One data set; a part of n samples gives ``round(weight * n)``.

    Raises:
        ValueError: If the lists differ in length, a weight is negative or not finite, or nothing is
            left.
    """
    if len(datasets) != len(weights):
        raise ValueError(f"{len(datasets)} data sets but {len(weights)} weights")
    generator = random.Random(f"mixture/{seed}")
    places: list[tuple[int, int]] = []
    for part, (dataset, weight) in enumerate(zip(datasets, weights, strict=True)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight {weight} of data set {part} must be finite and not negative")
        times, share = divmod(round(weight * len(dataset)), len(dataset))
        indices = list(range(len(dataset))) * times
        indices += generator.sample(range(len(dataset)), share)
        places += [(part, index) for index in indices]
    if not places:
        raise ValueError("the mixture is empty: every weight is 0 or rounds to no sample")
    generator.shuffle(places)
    return Mixture(datasets, places)
