"""Laws of patch alignment: which patch is which, and only the projector learns."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from milora_vl.data.images import build_image_transform, load_image
from milora_vl.model.load import load_vlm
from milora_vl.training.align import (
    BACKGROUND,
    UNCERTAIN,
    LabelledPicture,
    align_patches_,
    label_patches,
)


def test_patches_take_the_class_of_the_box_over_their_centre() -> None:
    labels = label_patches([(0, 0, 0.5, 0.5), (0.4, 0, 1, 0.5)], [1, 2], 100, 100, 4).view(4, 4)
    assert labels[0].tolist() == [1, 1, 2, 2]
    assert (labels[2:] == BACKGROUND).all()
    overlapping = label_patches([(0, 0, 1, 1), (0, 0, 0.5, 1)], [1, 2], 100, 100, 2).view(2, 2)
    assert overlapping.tolist() == [[UNCERTAIN, 1], [UNCERTAIN, 1]]


def test_boxes_move_with_the_padding() -> None:
    wide = label_patches([(0, 0, 1, 1)], [1], 200, 100, 4).view(4, 4)  # padded above and below
    assert wide.tolist() == [[0] * 4, [1] * 4, [1] * 4, [0] * 4]
    tall = label_patches([(0, 0, 1, 1)], [1], 100, 200, 4).view(4, 4)
    assert torch.equal(tall, wide.T)


def test_only_the_projector_learns_and_it_learns(tiny_checkpoint: Path, tmp_path: Path) -> None:
    vlm = load_vlm(tiny_checkpoint)
    vlm.model.requires_grad_(False)
    vlm.model.model.multi_modal_projector.requires_grad_(True)
    pictures = []
    for index, (name, colour) in enumerate([("cat", "red"), ("dog", "blue")] * 2):
        image = Image.new("RGB", (28, 28), "white")
        ImageDraw.Draw(image).rectangle((0, 0, 13, 27), fill=colour)
        image.save(tmp_path / f"{index}.png")
        pictures.append(LabelledPicture(str(tmp_path / f"{index}.png"), (name,), ((0, 0, 0.5, 1),)))
    before = {name: value.clone() for name, value in vlm.model.named_parameters()}
    share = align_patches_(
        vlm.model,
        vlm.processor.tokenizer,
        build_image_transform(vlm.processor.image_processor),
        load_image,
        pictures,
        steps=60,
        learning_rate=1e-2,
        seed=0,
        patches_per_step=32,
    )
    assert share > 0.9
    for name, value in vlm.model.named_parameters():
        assert torch.equal(before[name], value) != ("projector" in name), name


def test_records_without_boxes_are_refused(tiny_checkpoint: Path) -> None:
    vlm = load_vlm(tiny_checkpoint)
    with pytest.raises(ValueError, match="objects"):
        align_patches_(
            vlm.model,
            vlm.processor.tokenizer,
            lambda image: image,
            load_image,
            [],
            steps=1,
            learning_rate=1e-3,
            seed=0,
        )
