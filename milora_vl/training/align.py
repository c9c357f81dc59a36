"""Patch alignment: a cheap start for a projector when the places of objects are known.

Without the language model, the projector is trained to map each patch inside an object's box to the
token embeddings of the object's name, and every other patch to those of a line break. It takes
seconds; the next stage need not learn from captions alone which patches show what.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from milora_vl.data.images import BadImageError

logger = logging.getLogger(__name__)

TEMPERATURE = 0.07
BACKGROUND = 0
UNCERTAIN = -1
FEATURE_DROPOUT = 0.2
IMAGES_PER_PASS = 32


@dataclass(frozen=True)
class LabeledImage:
    """An image and its named boxes.

    Attributes:
        path: Image file.
        names: Name of each object.
        boxes: [x0, y0, x1, y1] of each object, as fractions of width and height.
        where: What to name in an error, such as "train.json[17]".
    """

    path: str
    names: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    where: str = ""


def label_patches(
    boxes: Sequence[Sequence[float]], classes: Sequence[int], width: int, height: int, grid: int
) -> Tensor:
    """Return the class that each patch of a square-padded image shows.

    Args:
        boxes: [x0, y0, x1, y1] as fractions of the unpadded image.
        classes: Class of each box, at least 1.
        width: Width of the unpadded image in px.
        height: Its height in px.
        grid: Patches on a side.

    Returns:
        int64 [grid * grid]: a class for patches whose center lies in one box, ``BACKGROUND`` for
        those in none, ``UNCERTAIN`` for those in several.
    """
    side = max(width, height)
    center = (torch.arange(grid) + 0.5) / grid * side
    x = ((center - (side - width) / 2) / width)[None, :].expand(grid, grid)
    y = ((center - (side - height) / 2) / height)[:, None].expand(grid, grid)
    labels = torch.full((grid, grid), BACKGROUND)
    for (x0, y0, x1, y1), label in zip(boxes, classes, strict=True):
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        labels[inside] = torch.where(labels[inside] == BACKGROUND, label, UNCERTAIN)
    return labels.flatten()


@torch.no_grad()
def name_embeddings(model: Any, tokenizer: Any, names: Sequence[str]) -> Tensor:
    """Compute the target vector of each class: the mean token embedding, row 0 a line break.

    Returns:
        float32 [1 + len(names), D].
    """
    table = model.get_input_embeddings()
    rows = []
    for text in ["\n", *[f" {name}" for name in names]]:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), device=model.device)
        rows.append(table(ids).float().mean(0))
    return torch.stack(rows)


@torch.no_grad()
def compute_tower_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Compute what the projector gets: the chosen hidden state(s) without the class token.

    Args:
        model: A LLaVA model.
        pixel_values: [B, 3, H, W].

    Returns:
        [B, P, D_vision], or D_vision times the number of chosen layers.
    """
    layers = model.config.vision_feature_layer
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    start = 1 if model.config.vision_feature_select_strategy == "default" else 0
    return torch.cat([state[:, start:] for state in chosen], dim=-1)


def _read(
    labeled: Sequence[LabeledImage], load: Callable[[str], Image.Image], skip_unreadable: bool
) -> tuple[list[LabeledImage], list[Image.Image]]:
    """Read images; skip unreadable ones with a warning, or raise."""
    group, images = [], []
    for one in labeled:
        try:
            images.append(load(one.path))
        except BadImageError as error:
            if not skip_unreadable:
                raise BadImageError(f"{one.where or one.path}: {error}") from error
            logger.warning("skipped: %s: %s", one.where, error)
            continue
        group.append(one)
    return group, images


def align_patches_(  # noqa: PLR0913  settings by keyword
    model: Any,
    tokenizer: Any,
    transform: Callable[[Image.Image], Tensor],
    load: Callable[[str], Image.Image],
    labeled: Sequence[LabeledImage],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    patches_per_step: int = 2048,
    skip_unreadable: bool = False,
) -> float:
    """Train the projector alone, in place, on patches whose class is known.

    Args:
        model: A LLaVA model with a frozen tower; only its projector changes.
        tokenizer: The language model's tokenizer.
        transform: RGB image -> float32 [3, H, W].
        load: Path -> RGB image.
        labeled: What to look at.
        steps: Optimizer steps.
        learning_rate: Peak learning rate (AdamW, cosine to zero).
        seed: Seed of the patches' order.
        patches_per_step: Patches in one step.
        skip_unreadable: Skip images that cannot be read, with a warning.

    Returns:
        Share of object patches that are nearest to their class, in the last tenth of the steps.

    Raises:
        ValueError: If no image has an object.
        BadImageError: If an image cannot be read; the message names file and record.
    """
    names = sorted({name for one in labeled for name in one.names})
    if not names:
        raise ValueError("patch alignment needs records with an 'objects' field; none has one")
    index = {name: i + 1 for i, name in enumerate(names)}
    features, labels = [], []
    for at in tqdm(range(0, len(labeled), IMAGES_PER_PASS), desc="patch features", unit="batch"):
        group, images = _read(labeled[at : at + IMAGES_PER_PASS], load, skip_unreadable)
        if not group:
            continue
        pixel_values = torch.stack([transform(image) for image in images])
        batch = compute_tower_features(model, pixel_values.to(model.device, model.dtype))
        grid = math.isqrt(batch.shape[1])
        for one, image in zip(group, images, strict=True):
            classes = [index[name] for name in one.names]
            labels.append(label_patches(one.boxes, classes, *image.size, grid))
        features.append(batch.flatten(0, 1).to(torch.bfloat16))  # gigabytes for thousands
    x, y = torch.cat(features), torch.cat(labels).to(model.device)
    objects = (y > BACKGROUND).nonzero().squeeze(1)
    background = (y == BACKGROUND).nonzero().squeeze(1)
    targets = name_embeddings(model, tokenizer, names)
    norm = targets[1:].norm(dim=1).mean()
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    n_background = patches_per_step // 8 if len(background) else 0
    right: list[float] = []
    for _ in tqdm(range(steps), desc="patch alignment", unit="step"):
        chosen = torch.cat(
            [
                objects[torch.randint(len(objects), (patches_per_step,), generator=generator)],
                background[
                    torch.randint(max(len(background), 1), (n_background,), generator=generator)
                ],
            ]
        )
        seen = functional.dropout(x[chosen].to(model.dtype), FEATURE_DROPOUT)
        out = projector(seen).float()  # [n, D]
        logits = functional.normalize(out, dim=-1) @ functional.normalize(targets, dim=-1).T
        loss = functional.cross_entropy(logits / TEMPERATURE, y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        hits = logits[:patches_per_step].argmax(-1) == y[chosen[:patches_per_step]]
        right.append(hits.float().mean().item())
    with torch.no_grad():  # the loss compares directions only; scale to the embeddings' length
        length = projector(x[objects[:4096]].to(model.dtype)).float().norm(dim=-1).mean()
        for parameter in projector.linear_2.parameters():
            parameter.mul_((norm / length).to(parameter.dtype))
    last = right[-max(1, steps // 10) :]
    share = sum(last) / len(last)
    logger.info(
        "patch alignment: %.0f %% of object patches match their name (of %d names)",
        *(100 * share, len(names)),
    )
    return share
