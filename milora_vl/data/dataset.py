"""Conversations + image folder -> training samples, one at a time; mixtures; order of an epoch.

A data set knows before training which samples it has, how long each is and whether it holds an
image, so that the sampler can make batches of one modality and of similar length. Bad records are
therefore skipped at construction, as far as the text and the images' headers show them. A sample
whose image fails only when it is decoded drops out of its batch and is not replaced.
"""

import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from milora_vl.constants import IGNORE_INDEX, IMAGE_TOKEN, VIDEO_TOKEN
from milora_vl.data.encode import Encoded, encode, encode_side_by_side
from milora_vl.data.images import (
    BadImageError,
    ImagePathError,
    ImageProcessorError,
    ImageReader,
    ImageTransform,
    load_image,
    read_image_size,
    resolve_image,
)
from milora_vl.data.prompts import PromptStyle
from milora_vl.data.records import Conversation, DataError, RecordError
from milora_vl.data.videos import FrameSampling, Video, load_frames, read_video_shape

logger = logging.getLogger(__name__)

_MAX_NAMED = 20
_UNFIT = "does not fit max_length or style"
_VISUALS = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)}")


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
    first, so that a lack of memory shows at the first step; left-over samples come last, in the
    only batches that may mix modalities.

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
    # an independent generator: every process gets the same order, whatever else drew numbers
    generator = random.Random(f"{seed}/{epoch}")
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        members = [index for index, flag in enumerate(has_image) if bool(flag) == modality]
        generator.shuffle(members)
        whole = len(members) - len(members) % batch_size  # whole batches of one modality
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


@dataclass(eq=False)
class ConversationDataset(Dataset):
    """Conversations as encoded samples.

    An item is ``{"input_ids": list[int], "labels": list[int]}``, with images also
    ``"pixel_values"``: float32 [n_images, 3, H, W], side by side also ``"branches"``: list[int];
    with ``image_reader`` instead of pixels what ``pad_batch`` calls ``image_inputs`` and
    ``token_inputs``. An item that turns out unreadable has ``"skipped": True``, one padding token
    and no label; ``pad_batch`` drops it.

    Attributes:
        conversations: Validated records, without those skipped at construction.
        image_folder: Where image names start.
        transform: RGB image -> float32 [3, H, W].
        style: Prompt style or its name.
        tokenizer: Holds the image token.
        tokens_per_image: Image tokens each image takes in ``input_ids``; without ``image_reader``.
        max_length: Longest sample in tokens, image tokens included; None for no limit.
        on_bad_image: Raise on an unreadable image, or skip its record. What the headers show (no
            image, too large, a shape that the processor refuses) is found at construction; an image
            that fails while it is decoded drops its sample from the batch.
        on_bad_length: Raise, when it is encoded, on a record that ``max_length`` leaves without
            image or answer; or skip such records at construction.
        side_by_side: Learn every exchange as if it were the only one of its conversation; see
            ``encode_side_by_side``.
        image_reader: Reads images and videos in place of ``transform`` and ``tokens_per_image``.
        video_sampling: Which frames of a video are shown.
        special_tokens_in_answers: Whether a special token's name in an answer is characters or the
            token; one that stands for an image is characters always.
        skipped: Number of skipped records (and samples, of this process) by reason.
    """

    conversations: Sequence[Conversation]
    image_folder: Path | str | None
    transform: ImageTransform | None
    style: PromptStyle | str
    tokenizer: PreTrainedTokenizerBase
    tokens_per_image: int
    max_length: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    on_bad_length: Literal["error", "skip"] = "error"
    side_by_side: bool = False
    image_reader: ImageReader | None = None
    video_sampling: FrameSampling = field(default_factory=FrameSampling)
    special_tokens_in_answers: Literal["literal", "token"] = "literal"
    skipped: Counter[str] = field(default_factory=Counter)
    _shapes: dict[Path, Video] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the options and, if asked, skip records that cannot be used."""
        for name, choices in (
            ("on_bad_image", ("error", "skip")),
            ("on_bad_length", ("error", "skip")),
            ("special_tokens_in_answers", ("literal", "token")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        if not (self.image_reader and self.image_reader.takes_videos):
            film = next((one for one in self.conversations if one.videos), None)
            if film:
                raise DataError(f"{_place(film)}: has a video, and this model takes none")
        if "skip" in (self.on_bad_image, self.on_bad_length):
            lengths = [self._length_if_usable(one) for one in self.conversations]
            kept = [length is not None for length in lengths]
            self.conversations = list(compress(self.conversations, kept))
            if self.on_bad_length == "skip":  # all were encoded for their lengths: keep these
                self.lengths = [length for length in lengths if length is not None]
            for reason, count in self.skipped.items():
                logger.warning("%d records skipped: %s", count, reason)
        if not self.conversations:
            raise DataError(f"the data set is empty; skipped: {dict(self.skipped) or 'nothing'}")
        self._warn_of_special_tokens()

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample; see the class.

        Raises:
            IndexError: If there is no such sample.
            RecordError: If the record cannot be encoded or does not fit ``max_length``.
            BadImageError: If an image is unreadable and ``on_bad_image`` is "error"; the message
                names the record.
        """
        index = range(len(self))[index]  # an index beyond the end must not wrap
        conversation = self.conversations[index]
        try:
            has_visuals = conversation.images or conversation.videos
            images = self._read_images(conversation) if has_visuals else None
            encoded = self._encode(conversation)
        except BadImageError as error:
            if self.on_bad_image == "error":
                raise
            self._count("unreadable image", error)
            return self._placeholder()
        sample: dict[str, Any] = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        if encoded.branches is not None:
            sample["branches"] = encoded.branches
        if self.image_reader:
            images = images or {}
            tokens = self.image_reader.token_inputs(encoded.input_ids, encoded.labels, images)
            return {**sample, "image_inputs": images, "token_inputs": tokens}
        return sample if images is None else {**sample, "pixel_values": images}

    def encode_at(self, index: int) -> Encoded:
        """Return ids and labels of one conversation; of images at most their size is read.

        Raises:
            RecordError: If it cannot be encoded; the message names the record.
            BadImageError: If an image's size is needed and cannot be read.
        """
        return self._encode(self.conversations[index])

    @cached_property
    def lengths(self) -> list[int]:
        """True length of every sample in tokens, image tokens included; images are not read."""
        return [len(self.encode_at(index).input_ids) for index in range(len(self))]

    @cached_property
    def has_image(self) -> list[bool]:
        """Whether each sample holds an image or a video."""
        return [bool(one.images or one.videos) for one in self.conversations]

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        """Names of special tokens that stand for no image, the longest first."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        names = {str(token) for token in tokens if token.special}
        names -= {IMAGE_TOKEN} | (self.image_reader.token_names() if self.image_reader else set())
        return tuple(sorted(names, key=len, reverse=True))

    def _warn_of_special_tokens(self) -> None:
        """Warn once if answers hold the name of a special token, with what it means here."""
        if not self._special_tokens:
            return
        # one search a turn: a data set can hold millions of answers
        pattern = re.compile("|".join(map(re.escape, self._special_tokens)))
        found: Counter[str] = Counter()
        places: list[str] = []
        for conversation in self.conversations:
            answers = (turn.text for turn in conversation.turns if turn.role == "assistant")
            names = {name for answer in answers for name in pattern.findall(answer)}
            if names:
                found.update(names)
                places.append(_place(conversation))
        if not places:
            return
        now, other, then = "characters", "token", "tokens"
        if self.special_tokens_in_answers == "token":
            now, other, then = "tokens", "literal", "characters"
        logger.warning(
            "special tokens' names in the answers of %d of %d records (first: %s; %s) are read as "
            "%s; data.special_tokens_in_answers: %s reads them as %s",
            len(places),
            len(self.conversations),
            places[0],
            ", ".join(name for name, _ in found.most_common(5)),
            now,
            other,
            then,
        )

    def _count(self, reason: str, error: ValueError) -> None:
        """Count a skipped record; only the first are named, because there may be thousands."""
        self.skipped[reason] += 1
        if self.skipped[reason] <= _MAX_NAMED:
            logger.warning("skipped: %s", error)

    def _length_if_usable(self, conversation: Conversation) -> int | None:
        """Return a record's length in tokens, or None to skip it; no image is decoded.

        Unless ``on_bad_length`` is "skip", nothing is encoded and the length is 0.
        """
        try:
            if self.on_bad_image == "skip":
                self._count_image_tokens(conversation, with_headers=True)
            if self.on_bad_length == "skip":
                return len(self._encode(conversation).input_ids)
        except BadImageError as error:
            if self.on_bad_image == "error":
                raise
            self._count("unreadable image", error)
            return None
        except RecordError as error:
            if self.on_bad_length == "error":  # found while reading headers
                raise
            self._count(error.reason, error)
            return None
        return 0

    def _count_image_tokens(
        self, conversation: Conversation, with_headers: bool = False
    ) -> list[int | str]:
        """Return what ``encode`` needs for each mark; headers are read if needed or asked for."""
        counts: list[int | str] = [self.tokens_per_image] * len(conversation.images)
        has_visuals = conversation.images or conversation.videos
        if not has_visuals or not (self.image_reader or with_headers):
            return counts
        try:
            sizes = [read_image_size(path) for path in self._paths(conversation)]
            if self.image_reader:
                texts = {IMAGE_TOKEN: iter(self.image_reader.expand(sizes))}
                shapes = self._video_shapes(conversation)
                texts[VIDEO_TOKEN] = iter(self.image_reader.expand_videos(shapes))
                asked = (turn.text for turn in conversation.turns if turn.role == "user")
                marks = (mark for text in asked for mark in _VISUALS.findall(text))
                return [next(texts[mark]) for mark in marks]
            for size in sizes:
                self.transform.check_size(*size)
        except BadImageError as error:
            raise _named(error, conversation) from error
        except ImageProcessorError as error:
            raise RecordError(_place(conversation), _UNFIT, str(error)) from error
        return counts

    def _encode(self, conversation: Conversation) -> Encoded:
        counts = self._count_image_tokens(conversation)
        as_tokens = self.special_tokens_in_answers == "token"
        make = encode_side_by_side if self.side_by_side else encode
        try:
            return make(
                conversation.turns,
                self.style,
                self.tokenizer,
                counts,
                self.max_length,
                answer_tokens=self._special_tokens if as_tokens else (),
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise RecordError(_place(conversation), _UNFIT, str(error)) from error

    def _placeholder(self) -> dict[str, Any]:
        """Return the item of an unreadable sample: one token, no image, no label."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id  # Llama's tokenizers have none
        input_ids = [tokenizer.eos_token_id if pad is None else pad]
        sample: dict[str, Any] = {"input_ids": input_ids, "labels": [IGNORE_INDEX]}
        if self.image_reader:
            tokens = self.image_reader.token_inputs(input_ids, sample["labels"], {})
            sample |= {"image_inputs": {}, "token_inputs": tokens}
        return {**sample, "skipped": True}

    def _video_shapes(self, conversation: Conversation) -> list[Video]:
        """Return blank videos of the record's shapes; a file is looked into once."""
        shapes = []
        for path in self._paths(conversation, conversation.videos):
            if path not in self._shapes:
                self._shapes[path] = read_video_shape(path, self.video_sampling)
            shapes.append(self._shapes[path])
        return shapes

    def _paths(self, conversation: Conversation, names: Sequence[str] | None = None) -> list[Path]:
        """Return the paths of files of a record, by default of its images."""
        names = conversation.images if names is None else names
        if self.image_folder is None:
            raise RecordError(_place(conversation), "no image folder", "set data.image_folder")
        try:
            return [resolve_image(self.image_folder, name) for name in names]
        except ImagePathError as error:
            raise RecordError(_place(conversation), "bad image path", str(error)) from error

    def _read_images(self, conversation: Conversation) -> Tensor | dict[str, Tensor]:
        """Decode the images and videos of a record and turn them into the model's inputs."""
        paths = self._paths(conversation)
        try:
            images = [load_image(path) for path in paths]
            if self.image_reader:
                films = self._paths(conversation, conversation.videos)
                videos = [load_frames(path, self.video_sampling) for path in films]
                return self.image_reader.read(images, videos)
            # sizes are equal: the transform gives every image the shape that the tower takes
            return torch.stack([self.transform(one) for one in images])  # [n, 3, H, W]
        except BadImageError as error:
            raise _named(error, conversation) from error
        except ImageProcessorError as error:
            raise RecordError(_place(conversation), _UNFIT, str(error)) from error


def _place(conversation: Conversation) -> str:
    return conversation.where or conversation.id


def _named(error: BadImageError, conversation: Conversation) -> BadImageError:
    """Return the error with the place of the record and the names of its images in front."""
    names = ", ".join((*conversation.images, *conversation.videos))
    return BadImageError(f"{_place(conversation)}: {names}: {error}")


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


def mix(datasets: Sequence[ConversationDataset], seed: int) -> Mixture:
    """Join data sets into one, in a random order that depends on the seed alone."""
    places = [(part, index) for part, one in enumerate(datasets) for index in range(len(one))]
    random.Random(f"mixture/{seed}").shuffle(places)
    return Mixture(datasets, places)
