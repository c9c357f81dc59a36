"""Do two models compute the same? Logits on a small real batch, with a tolerance by dtype."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_vl.adapter.attach import compute_logits
from milora_vl.adapter.quantized import is_quantized
from milora_vl.constants import IMAGE_TOKEN

TOLERANCES: dict[torch.dtype, float] = {
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest difference allowed, over the largest logit. Rounding grows through the layers: a deep
model in bfloat16 (8 bits) gives logits that differ by some per cent when sums are ordered anew."""


@dataclass(frozen=True)
class LogitsCheck:
    """The outcome for one batch.

    Attributes:
        name: Which batch.
        difference: Largest absolute difference of the logits.
        largest: Largest absolute logit of the reference.
        agreement_ratio: Share of positions whose most likely token is the same, 0 to 1.
        tolerance: Largest difference / largest allowed; None if the difference is only reported.
    """

    name: str
    difference: float
    largest: float
    agreement_ratio: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN never is."""
        limit = float("inf") if self.tolerance is None else self.tolerance * self.largest
        return self.difference < float("inf") and self.difference <= limit

    def __str__(self) -> str:
        """Return one line for people."""
        relative = self.difference / self.largest if self.largest > 0 else 0.0
        if self.tolerance is None:
            limit = "reported, not judged" if self.passed else "FAILED: not finite"
        else:
            limit = f"tolerance {self.tolerance:.0e}: {'ok' if self.passed else 'FAILED'}"
        return (
            f"{self.name}: logits of text differ by at most {self.difference:.2e} (largest logit "
            f"{self.largest:.2f}, relative {relative:.1e}); same best token at "
            f"{100 * self.agreement_ratio:.1f} % of positions; {limit}"
        )


def check_batches(
    processor: Any, device: torch.device, dtype: torch.dtype, picture: Image.Image, question: str
) -> dict[str, dict[str, Tensor]]:
    """Build one prompt with an image, if the processor takes any, and one without.

    Args:
        processor: Of the base model.
        device: Where the model is.
        dtype: Of the pixels.
        picture: RGB image.
        question: Plain text.

    Returns:
        Name of the batch -> model inputs.
    """
    found = {"text": processor(text=question, return_tensors="pt")}
    if getattr(processor, "image_processor", None) is not None:
        mark = getattr(processor, "image_token", IMAGE_TOKEN)
        text = f"{mark}\n{question}"
        found["picture and text"] = processor(images=picture, text=text, return_tensors="pt")
    return {
        name: {
            key: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for key, value in inputs.items()
        }
        for name, inputs in found.items()
    }


def drawn_picture() -> Image.Image:
    """Return an image with edges, colors and a gradient, the same everywhere."""
    picture = Image.linear_gradient("L").resize((224, 160)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 30, 90, 100), fill=(200, 40, 30))
    draw.rectangle((120, 60, 200, 140), fill=(30, 60, 190))
    draw.polygon([(100, 20), (140, 20), (120, 55)], fill=(240, 200, 40))
    return picture


def tolerance_of(model: PreTrainedModel) -> float:
    """Return the tolerance for a model's dtype; 4-bit layers multiply in bfloat16."""
    quantized = any(is_quantized(parameter) for parameter in model.parameters())
    return TOLERANCES[torch.bfloat16 if quantized else model.dtype]


def logits_of(model: nn.Module, batches: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the logits [1, T_text, V] of every batch where it has text, on the CPU in float32.

    Logits at image tokens are not compared: no token is predicted there, neither in training nor in
    generation, and single patches can be so ill-conditioned that their logits are mostly float32
    rounding. Their effect on the text after them shows in its logits.
    """
    found = {}
    for name, inputs in batches.items():
        is_text = inputs["input_ids"][0] != getattr(model.config, "image_token_id", -1)  # [T]
        found[name] = compute_logits(model, inputs)[:, is_text.cpu()]
    return found


def compare_logits(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float | None
) -> list[LogitsCheck]:
    """Compare the logits of two models batch by batch.

    Args:
        wanted: Logits of the reference.
        found: Logits of the other model.
        tolerance: See ``LogitsCheck``.
    """
    return [
        LogitsCheck(
            name=name,
            difference=float((found[name] - logits).abs().max()),
            largest=float(logits.abs().max()),
            agreement_ratio=float((found[name].argmax(-1) == logits.argmax(-1)).float().mean()),
            tolerance=tolerance,
        )
        for name, logits in wanted.items()
    ]
