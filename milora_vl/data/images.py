"""Image file -> RGB picture -> pixel values, safely.

Pictures are opened as LLaVA opens them: ``convert("RGB")`` and no EXIF rotation, so that scores of
checkpoints trained that way stay comparable. Alpha is dropped, not blended; of an animation the
first frame is taken. Nothing is fetched from the network.

Pictures through a model's own processor: the text they become in the prompt, and the tensors.
"""

import os
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from milora_vl.constants import IGNORE_INDEX

_TEXT_FIELDS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "cross_attention_mask",
    "text_replacement_offsets",
)
Size = tuple[int, int]


class PictureError(ValueError):
    """Pictures that the processor does not take, or a processor that does not say what it does."""


@dataclass(eq=False)
class ProcessorPictures:
    """Asks the processor; for families whose pictures take different numbers of tokens.

    Attributes:
        processor: A transformers processor with an ``image_token``.
        token_types: See ``milora_vl.model.families.Family``.
        cross_attention: As there.
        max_images: As there.
    """

    processor: ProcessorMixin
    token_types: Literal["none", "mm_token_type_ids", "token_type_ids", "prefix"] = "none"
    cross_attention: bool = False
    max_images: int | None = None
    _texts: dict[tuple[Size, ...], list[str]] = field(default_factory=dict, repr=False)

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        """Return what stands in the prompt for each picture of one sample.

        The text depends on the pictures' sizes alone, so it is found with blank ones and kept.

        Args:
            sizes: (width, height) in px of each picture.

        Raises:
            PictureError: If there are more pictures than the family takes.
        """
        key = tuple(sizes)
        if key not in self._texts:
            blanks = [Image.new("RGB", size) for size in sizes]
            self._texts[key] = self._process(blanks)[0] if blanks else []
        return self._texts[key]

    def read(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the tensors of one sample's pictures, by the names of the model's arguments."""
        return self._process(pictures)[1]

    def token_inputs(
        self, input_ids: Sequence[int], labels: Sequence[int] | None, images: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what the model wants to know of each token, beside its id.

        Args:
            input_ids: Token ids of one sample, length T.
            labels: Its labels; None when it is a prompt.
            images: The result of ``read``; empty without pictures.

        Returns:
            Tensors whose first axis is T.
        """
        if self.token_types == "prefix":
            first = len(input_ids)
            if labels is not None:
                first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
            return {"token_type_ids": (torch.arange(len(input_ids)) >= first).long()}
        if self.token_types != "none":
            is_picture = torch.isin(torch.tensor(input_ids), torch.tensor(self._picture_ids()))
            return {self.token_types: is_picture.long()}
        if self.cross_attention and images:
            return {"cross_attention_mask": self._cross_attention_mask(input_ids, images)}
        return {}

    def _picture_ids(self) -> list[int]:
        return [token for token in self.processor.image_token_ids if token is not None]

    def _cross_attention_mask(self, input_ids: Sequence[int], images: dict[str, Tensor]) -> Tensor:
        """Return which tiles each token sees: int64 [T, images, tiles]; Mllama's own rule."""
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense,
            get_cross_attention_token_mask,
        )

        n_tiles = images["aspect_ratio_mask"].sum(-1).tolist()  # [1, images]
        spans = get_cross_attention_token_mask(list(input_ids), self.processor.image_token_id)
        dense = convert_sparse_cross_attention_mask_to_dense(
            [spans], n_tiles, images["aspect_ratio_mask"].shape[-1], len(input_ids)
        )
        return torch.as_tensor(dense[0])

    def _process(self, pictures: Sequence[Image.Image]) -> tuple[list[str], dict[str, Tensor]]:
        if self.max_images is not None and len(pictures) > self.max_images:
            raise PictureError(
                f"{len(pictures)} pictures in one sample, but "
                f"{type(self.processor).__name__} takes {self.max_images}"
            )
        token = self.processor.image_token
        output = self.processor(
            text=[token * len(pictures)],
            images=[list(pictures)],
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )
        if self.cross_attention:
            texts = [token] * len(pictures)
        elif "text_replacement_offsets" in output:
            texts = [item["replacement"] for item in output["text_replacement_offsets"][0]]
        else:
            raise PictureError(
                f"{type(self.processor).__name__} does not say what its image token becomes"
            )
        tensors = {name: value for name, value in output.items() if name not in _TEXT_FIELDS}
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise PictureError(
                    f"{type(self.processor).__name__} gives {name} as {type(value).__name__}, "
                    "which cannot be batched"
                )
        return texts, tensors


MAX_IMAGE_PIXELS = 89_478_485
"""Largest picture read by default, in pixels (Pillow's own warning threshold)."""

_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError)


class ImagePathError(ValueError):
    """An image name that is a URL or leaves the image folder."""


class BadImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def resolve_image(image_folder: Path | str, name: str) -> Path:
    """Return the path of an image below the image folder.

    The check is on the name, not on the disk: links that the owner of the folder placed in it are
    followed, a record cannot climb out with ``..`` or an absolute path.

    Args:
        image_folder: Where names start.
        name: Relative path; an absolute one only if it lies below the folder.

    Returns:
        The path; it may not exist.

    Raises:
        ImagePathError: If the name is a URL, is empty, or leaves the folder.
    """
    if re.match(r"(?i)(data:|[a-z][a-z0-9+.-]*://)", name):
        raise ImagePathError(f"{name[:120]!r} is a URL; download it and give a file name")
    if not name.strip() or "\0" in name:
        raise ImagePathError(f"{name[:120]!r} is not a file name")
    folder = Path(image_folder)
    normal = Path(os.path.normpath(name))
    top = Path(os.path.abspath(folder))  # noqa: PTH100  Path.resolve would follow links
    if normal.anchor and normal.is_relative_to(top):
        normal = normal.relative_to(top)
    if normal.anchor or not normal.parts or normal.parts[0] == "..":
        raise ImagePathError(f"{name!r} is outside the image folder {folder}")
    return folder / normal


def load_image(path: Path | str, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Read and fully decode one picture.

    Args:
        path: An image file.
        max_pixels: Largest width times height; it is checked before decoding.

    Returns:
        An RGB picture.

    Raises:
        BadImageError: If the file is missing, corrupt, cut short or too large; it is named.
    """
    try:
        with warnings.catch_warnings():
            # max_pixels decides here, not Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadImageError(
                        f"{path}: {width} x {height} px is more than the limit of {max_pixels} px"
                    )
                return image.convert("RGB")
    except BadImageError:
        raise
    except (*_DECODE_ERRORS, struct.error, Image.DecompressionBombError) as error:
        raise BadImageError(f"{path}: cannot be read as an image ({error})") from error


def read_image_size(path: Path | str) -> tuple[int, int]:
    """Return (width, height) in px from the file's header; pixels are not decoded.

    Raises:
        BadImageError: If the file is missing or no image; it is named.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (*_DECODE_ERRORS, struct.error, Image.DecompressionBombError) as error:
        raise BadImageError(f"{path}: cannot be read as an image ({error})") from error


def pad_to_square(
    image: Image.Image, background_rgb: Sequence[int], *, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Centre a picture on a square of its longer side (LLaVA's ``expand2square``).

    A picture so long that its square would pass ``max_pixels`` is shrunk first, in proportion.

    Args:
        image: An RGB picture.
        background_rgb: Colour of the border, 0 to 255.
        max_pixels: Largest square, in pixels.

    Returns:
        The square picture; a square one is returned as it is.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > max_pixels:
        ratio = int(max_pixels**0.5) / side
        width, height = max(1, int(width * ratio)), max(1, int(height * ratio))
        image, side = image.resize((width, height)), max(width, height)
    square = Image.new("RGB", (side, side), tuple(background_rgb))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_colour(image_processor: Any) -> tuple[int, int, int]:
    """Return the processor's mean as a colour, ``int(255 * mean)`` a channel, as LLaVA rounds it.

    Raises:
        ValueError: If the processor has no mean of three channels.
    """
    mean = getattr(image_processor, "image_mean", None)
    if mean is None or len(mean) != 3:
        raise ValueError(
            f"the image processor's image_mean is {mean!r}; padding needs three channels, "
            "else use pad=False"
        )
    red, green, blue = (int(255 * channel) for channel in mean)
    return red, green, blue


def build_image_transform(image_processor: Any, pad: bool = True) -> Callable[..., Tensor]:
    """Build the function that turns an RGB picture into pixel values.

    Args:
        image_processor: A transformers image processor (Pillow or torchvision backed).
        pad: Pad to a square with the processor's mean colour first, which keeps the aspect ratio
            and the whole picture; otherwise the processor alone resizes and crops.

    Returns:
        A picklable callable: RGB picture -> float32 [3, H, W].

    Raises:
        ValueError: If ``pad`` is set and the processor has no mean colour.
    """
    background = mean_colour(image_processor) if pad else None
    return _ImageTransform(image_processor, background)


class _ImageTransform:
    """Padding and processor as one picklable callable."""

    def __init__(self, image_processor: Any, background: tuple[int, int, int] | None) -> None:
        self.image_processor = image_processor
        self.background = background

    def __call__(self, image: Image.Image) -> Tensor:
        if self.background is not None:
            image = pad_to_square(image, self.background)
        output = self.image_processor(images=image, return_tensors="pt")
        return output["pixel_values"][0].to(torch.float32)  # [3, H, W]
