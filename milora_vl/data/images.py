"""Image file -> RGB image -> pixel values, safely.

Every image becomes 8-bit RGB. Alpha is dropped, not blended; an animation gives its first frame.
The EXIF orientation is applied in every format that has one, as transformers and datasets do.
Gray deeper than 8 bits is scaled, see ``load_image``. Nothing is fetched from the network.

Two classes make pixel values: ``ImageTransform`` for models whose images all take the same number
of tokens, and ``ImageReader``, which asks the model's own processor, for all others.
"""

import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from milora_vl.constants import IGNORE_INDEX
from milora_vl.errors import MiloraError

if TYPE_CHECKING:
    from milora_vl.data.videos import Video

_TEXT_FIELDS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "cross_attention_mask",
    "text_replacement_offsets",
)
_MEDIA = ("image", "video", "audio")
_CUT_MARGIN_PX = 8  # more than any kernel of a resizing that enlarges looks at
Size = tuple[int, int]


class ImageProcessorError(MiloraError, ValueError):
    """More images than a model takes, or a processor whose output cannot be used."""


class ImagePathError(MiloraError, ValueError):
    """An image name that is a URL or leaves the image folder."""


class BadImageError(MiloraError, ValueError):
    """An image that cannot be read, or has a size that cannot be used; the message names it."""


@dataclass(eq=False)
class ImageReader:
    """Reads images with a model's own processor, where images take different numbers of tokens.

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
    _texts: dict[Any, list[str]] = field(default_factory=dict, repr=False)

    def expand(self, sizes: Sequence[Size]) -> list[str]:
        """Return the text that each image of one sample becomes in the prompt.

        The text depends on the sizes alone, so it is found with blank images and kept.

        Args:
            sizes: (width, height) in px of each image.

        Raises:
            ImageProcessorError: If there are more images than the family takes.
            BadImageError: If the processor refuses an image of such a size.
        """
        key = tuple(sizes)
        if key not in self._texts:
            blanks = [Image.new("RGB", size) for size in sizes]
            self._texts[key] = self._process(blanks)[0] if blanks else []
        return self._texts[key]

    def expand_videos(self, videos: Sequence["Video"]) -> list[str]:
        """Return what stands in the prompt for each video of one sample; frames are not looked at.

        Raises:
            ImageProcessorError: If the family takes no videos.
            BadImageError: If the processor refuses a video of such a shape.
        """
        key = ("videos", *(video.shape() for video in videos))
        if videos and key not in self._texts:
            self._texts[key] = self._process([], [video.blank() for video in videos])[0]
        return self._texts[key] if videos else []

    def read(
        self, images: Sequence[Image.Image], videos: Sequence["Video"] = ()
    ) -> dict[str, Tensor]:
        """Return the tensors of one sample's images and videos, by the model's argument names."""
        return self._process(images, videos)[1]

    @property
    def takes_videos(self) -> bool:
        """Whether the processor has a mark and a reader for videos."""
        names = ("video_token", "video_processor")
        return all(getattr(self.processor, name, None) is not None for name in names)

    def token_inputs(
        self, input_ids: Sequence[int], labels: Sequence[int] | None, images: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what the model takes for each token beside its id.

        Args:
            input_ids: Token ids of one sample, length T.
            labels: Its labels; None when it is a prompt.
            images: The result of ``read``; empty without images.

        Returns:
            Tensors whose first axis is T.
        """
        if self.token_types == "prefix":
            # PaliGemma reads all before the answer in both directions: type 0 up to there, then 1
            learned = (i for i, label in enumerate(labels or []) if label != IGNORE_INDEX)
            first = next(learned, len(input_ids))
            return {"token_type_ids": (torch.arange(len(input_ids)) >= first).long()}
        if self.token_types != "none":
            ids = torch.tensor(input_ids)
            types = torch.isin(ids, torch.tensor(self._image_ids())).long()
            if self.takes_videos and self.token_types == "mm_token_type_ids":
                types[torch.isin(ids, torch.tensor(self._video_ids()))] = 2
            return {self.token_types: types}
        if self.cross_attention and images:
            return {"cross_attention_mask": self._cross_attention_mask(input_ids, images)}
        return {}

    def token_names(self) -> set[str]:
        """Return the tokens that stand for images, video or sound, which no text may contain."""
        names = (getattr(self.processor, f"{kind}_token", None) for kind in _MEDIA)
        found = self.processor.tokenizer.convert_ids_to_tokens(self._image_ids())
        return {name for name in (*names, *found) if isinstance(name, str)}

    def _image_ids(self) -> list[int]:
        return [token for token in self.processor.image_token_ids if token is not None]

    def _video_ids(self) -> list[int]:
        return [token for token in self.processor.video_token_ids if token is not None]

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

    def _process(
        self, images: Sequence[Image.Image], videos: Sequence["Video"] = ()
    ) -> tuple[list[str], dict[str, Tensor]]:
        if self.max_images is not None and len(images) > self.max_images:
            raise ImageProcessorError(
                f"{len(images)} images in one sample, but "
                f"{type(self.processor).__name__} takes {self.max_images}"
            )
        if videos and not self.takes_videos:
            raise ImageProcessorError(f"{type(self.processor).__name__} takes no videos")
        token = self.processor.image_token
        text = token * len(images) + (self.processor.video_token * len(videos) if videos else "")
        media: dict[str, Any] = {"images": [list(images)]} if images else {}
        if videos:
            media["videos"] = [np.ascontiguousarray(video.frames) for video in videos]
            media["video_metadata"] = [video.metadata() for video in videos]
            media["do_sample_frames"] = False  # ``FrameSampling`` has chosen them
        try:
            output = self.processor(
                text=[text], **media, return_text_replacement_offsets=True, return_tensors="pt"
            )
        except MemoryError:
            raise
        except Exception as error:  # each processor refuses a shape with an error of its own
            sizes = [f"{one.width} x {one.height} px" for one in images]
            sizes = ", ".join(sizes + [f"frames of {video.frames.shape}" for video in videos])
            raise BadImageError(
                f"{type(self.processor).__name__} refuses {sizes}: {type(error).__name__}: {error}"
            ) from error
        # with cross attention an image is one token in the text, whatever its size
        if self.cross_attention:
            texts = [token] * len(images)
        elif "text_replacement_offsets" in output:
            texts = [item["replacement"] for item in output["text_replacement_offsets"][0]]
        else:
            raise ImageProcessorError(
                f"{type(self.processor).__name__} does not say what its image token becomes"
            )
        tensors = {name: value for name, value in output.items() if name not in _TEXT_FIELDS}
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ImageProcessorError(
                    f"{type(self.processor).__name__} gives {name} as {type(value).__name__}, "
                    "which cannot be batched"
                )
        return texts, tensors


MAX_IMAGE_PIXELS = 89_478_485
"""Largest image read by default, in pixels (Pillow's own warning threshold)."""

_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error)


def resolve_image(image_folder: Path | str, name: str) -> Path:
    """Return the path of an image below the image folder.

    The check is on the name, not on the disk: links that the owner of the folder placed in it are
    followed, a record cannot climb out with ``..`` or an absolute path.

    Args:
        image_folder: Where names start.
        name: Relative path; an absolute one only if it lies below the folder. ``file://`` names are
            paths, percent-encoded as in any URL.

    Returns:
        The path; it may not exist.

    Raises:
        ImagePathError: If the name is another URL, is empty, or leaves the folder.
    """
    if re.match(r"(?i)file:/", name):
        name = unquote(re.sub(r"(?i)^file:(//(localhost(?=/))?)?", "", name))
    if re.match(r"(?i)(data:|[a-z][a-z0-9+.-]*://)", name):
        raise ImagePathError(f"{name[:120]!r} is a URL; download it and give a file name")
    if not name.strip() or "\0" in name:
        raise ImagePathError(f"{name[:120]!r} is not a file name")
    folder = Path(image_folder)
    # normpath works on the name alone: ".." is resolved before a link could lead elsewhere
    normal = Path(os.path.normpath(name))
    top = Path(os.path.abspath(folder))  # noqa: PTH100  Path.resolve would follow links
    if normal.anchor and normal.is_relative_to(top):
        normal = normal.relative_to(top)
    if normal.anchor or not normal.parts or normal.parts[0] == "..":
        raise ImagePathError(f"{name!r} is outside the image folder {folder}")
    return folder / normal


def load_image(path: Path | str, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Read and fully decode one image.

    Gray deeper than 8 bits is scaled to 8: 12 or 16 bits by the depth in the file, so that the
    largest value the file can hold is white. 32-bit integers that all fit into 8 or 16 bits are
    taken as such, because such files rarely use their full range; others are scaled by their range,
    lowest to highest, and so are floats.

    Args:
        path: An image file.
        max_pixels: Largest width times height; it is checked before decoding.

    Returns:
        An RGB image, turned as its EXIF orientation says.

    Raises:
        BadImageError: If the file is missing, corrupt, cut short or too large; it is named.
    """
    with _opened(path, max_pixels) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as 8-bit RGB, turned upright; ``load_image`` says how.

    Raises:
        ValueError: If a float image holds values that are not finite.
    """
    turn = _find_turn(image)  # before decoding, as ``read_image_size`` does
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(_scale_to_8_bits(image))
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def read_image_size(path: Path | str, *, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Return (width, height) in px that ``load_image`` will give; only the header is read.

    Raises:
        BadImageError: If the file is missing, no image or too large; it is named.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        return (height, width) if _find_turn(image) in _SIDEWAYS else (width, height)


@contextmanager
def _opened(path: Path | str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image of at most ``max_pixels``; every error in the block is a ``BadImageError``."""
    try:
        with warnings.catch_warnings():
            # max_pixels decides here, not Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImageError(
                    f"{path}: {width} x {height} px is more than the limit of {max_pixels} px"
                )
            yield image
    except BadImageError:
        raise
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise BadImageError(f"{path}: cannot be read as an image ({error})") from error


_ORIENTATION = 0x0112  # the EXIF tag, and the TIFF tag of the same name
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return how an opened image has to be turned; None for not at all. Nothing is decoded."""
    if image.format == "TIFF":
        return None  # Pillow turns TIFF itself, and its header's size is that of the turned image
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}:
        return None  # Pillow would decode the image to look for EXIF data behind the pixels
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    except _DECODE_ERRORS:
        return None  # the pixels may still be readable


def _scale_to_8_bits(image: Image.Image) -> np.ndarray:
    """Return the gray values of a deep image as uint8 [H, W]; see ``load_image`` for the rule."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF; 258 is BitsPerSample, 339 SampleFormat
    bits = (tags.get(258) or (16,))[0]
    if image.mode.startswith("I;"):
        top = 2 ** min(bits, 16) - 1
        return ((values.astype(np.uint32) * 255 + top // 2) // top).clip(0, 255).astype(np.uint8)
    if image.mode == "I" and bits == 32 and (tags.get(339) or (1,))[0] == 1:
        values = values.view(np.uint32)  # unsigned in the file; Pillow knows signed ones alone
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite([lowest, highest]).all():
        raise ValueError("it holds values that are not finite")
    if image.mode == "I" and lowest >= 0 and highest < 2**16:
        from_16_bits = highest >= 2**8 or image.format != "TIFF"  # Pillow widens those of PGM
        lowest, highest = 0.0, 65535.0 if from_16_bits else 255.0
    if highest == lowest:
        return np.zeros(values.shape, np.uint8)
    # halves first: the difference of two floats can be more than a float holds
    scale = 255 / (highest / 2 - lowest / 2)
    scaled = (values.astype(np.float64) / 2 - lowest / 2) * scale
    return scaled.round().astype(np.uint8)


def pad_to_square(
    image: Image.Image, background_rgb: Sequence[int], *, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """Center an image on a square of its longer side (LLaVA's ``expand2square``).

    An image so long that its square would pass ``max_pixels`` is shrunk first, in proportion.

    Args:
        image: An RGB image.
        background_rgb: Color of the border, 0 to 255.
        max_pixels: Largest square, in pixels.

    Returns:
        The square image; a square one is returned as it is.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > max_pixels:  # the limit holds for the square, not only for the file
        ratio = int(max_pixels**0.5) / side
        width, height = max(1, int(width * ratio)), max(1, int(height * ratio))
        image, side = image.resize((width, height)), max(width, height)
    square = Image.new("RGB", (side, side), tuple(background_rgb))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_color(image_processor: Any) -> tuple[int, int, int]:
    """Return the processor's mean as a color, ``int(255 * mean)`` a channel, as LLaVA rounds it.

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


class ImageTransform:
    """A picklable callable: RGB image -> float32 pixel values [3, H, W].

    Args:
        image_processor: A transformers image processor (Pillow or torchvision backed).
        pad: Pad to a square with the processor's mean color first, which keeps the aspect ratio
            and the whole image; otherwise the processor alone resizes and crops.

    Raises:
        ValueError: If ``pad`` is set and the processor has no mean color.
    """

    def __init__(self, image_processor: Any, pad: bool = True) -> None:
        """See the class."""
        self.image_processor = image_processor
        self.background = mean_color(image_processor) if pad else None

    def check_size(self, width: int, height: int) -> None:
        """Check that an image of this size, once resized, is within the limit of pixels.

        Raises:
            BadImageError: If it is not, and no center crop follows.
        """
        edge = self._edge(width, height)
        if edge and not getattr(self.image_processor, "do_center_crop", False):
            longer = edge * max(width, height) // min(width, height)
            raise BadImageError(
                f"{width} x {height} px would be resized to {longer} x {edge} px, which is more "
                f"than the limit of {MAX_IMAGE_PIXELS} px; set data.pad_to_square: true"
            )

    def _edge(self, width: int, height: int) -> int | None:
        """Return the shorter edge that the processor makes, if the result is beyond the limit.

        Such a processor turns 1500 x 1 px into 504,000 x 336 px before it crops the middle.
        """
        edge = (self.image_processor.size or {}).get("shortest_edge")
        if self.background is not None or not edge or not self.image_processor.do_resize:
            return None
        resized = edge * edge * max(width, height) // min(width, height)
        return edge if resized > MAX_IMAGE_PIXELS else None

    def _cut_middle(self, image: Image.Image, edge: int) -> Image.Image:
        """Cut an image to the part that the center crop will show, and a margin."""
        sides = list(image.size)
        at = sides.index(max(sides))
        crop = self.image_processor.crop_size
        shown = max(crop["height"], crop["width"]) * min(sides) // edge
        start = max(0, (sides[at] - shown) // 2 - _CUT_MARGIN_PX)
        box = [0, 0, *sides]
        box[at], box[at + 2] = start, sides[at] - start  # the same on both ends keeps the middle
        return image.crop(tuple(box))

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 [3, H, W] of an RGB image.

        Raises:
            BadImageError: See ``check_size``.
        """
        self.check_size(*image.size)
        edge = self._edge(*image.size)
        if edge:
            image = self._cut_middle(image, edge)
        if self.background is not None:
            image = pad_to_square(image, self.background)
        output = self.image_processor(images=image, return_tensors="pt")
        return output["pixel_values"][0].to(torch.float32)  # [3, H, W]
