"""Pictures through a model's own processor: the text they become in the prompt, and the tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

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
