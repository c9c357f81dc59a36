"""Laws of patch alignment: which patch is which, and only the projector learns."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from milora_vl.config import AlignmentSection, DataSection, ModelSection
from milora_vl.data.images import BadImageError, ImageTransform, load_image
from milora_vl.data.records import read_records
from milora_vl.model.load import load_vlm
from milora_vl.training.align import (
    BACKGROUND,
    UNCERTAIN,
    LabeledImage,
    align_patches_,
    label_patches,
)
from milora_vl.training.arguments import build_arguments
from milora_vl.training.inputs import build_dataset
from milora_vl.training.projector import align_projector, aligned_base_folder, read_objects


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
        pictures.append(LabeledImage(str(tmp_path / f"{index}.png"), (name,), ((0, 0, 0.5, 1),)))
    before = {name: value.clone() for name, value in vlm.model.named_parameters()}
    share = align_patches_(
        vlm.model,
        vlm.processor.tokenizer,
        ImageTransform(vlm.processor.image_processor),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image": "a.png", "objects": [{"name": "cat"}]}]', r"r.json\[0\].*'box'"),
        ('[{"objects": [{"name": "cat", "box": [0, 0, 1, 1]}]}]', r"r.json\[0\].*'image'"),
        ('["a record"]', r"r.json\[0\]: bad objects"),
        ('[{"image": "../a.png", "objects": [{"name": "cat", "box": [0, 0, 1, 1]}]}]', "outside"),
        ('[{"image": "a.png", "objects": [{"name": "cat", "box": [0, 0, 9, 1]}]}]', "four fract"),
        ('[{"image": "a.png", "objects": [{"name": 3, "box": [0, 0, 1, 1]}]}]', "four fractions"),
        ('{"image": "a.png"}\n{"image": "b.png"}', "r.json: patch alignment reads a JSON list"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    data = DataSection(train=["r.json"], image_folder=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        read_objects(data, str(tmp_path / "r.json"))
    if text.startswith("["):
        skipping = data.model_copy(update={"on_bad_record": "skip"})
        assert read_objects(skipping, str(tmp_path / "r.json")) == []


def test_an_unreadable_picture_names_its_record_or_is_left_out(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    vlm = load_vlm(tiny_checkpoint)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (28, 28), "red").save(tmp_path / "good.png")
    pictures = [
        LabeledImage(str(tmp_path / name), ("cat",), ((0, 0, 1, 1),), f"r.json[{index}]")
        for index, name in enumerate(("good.png", "bad.png"))
    ]
    settings = {"steps": 2, "learning_rate": 1e-3, "seed": 0, "patches_per_step": 8}
    transform = ImageTransform(vlm.processor.image_processor)
    parts = (vlm.model, vlm.processor.tokenizer, transform, load_image, pictures)
    with pytest.raises(BadImageError, match=r"r\.json\[1\].*bad\.png"):
        align_patches_(*parts, **settings)
    align_patches_(*parts, **settings, skip_unreadable=True)


def test_an_aligned_base_is_that_of_its_own_model(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[]", encoding="utf-8")
    data = DataSection(train=[str(tmp_path / "r.json")], image_folder=str(tmp_path))
    model = ModelSection(path="x", prompt_style="chatml")

    def folder(base: Path, model: ModelSection = model) -> Path:
        return aligned_base_folder(base, model, AlignmentSection(), data, 0)

    for name, weights in (("a", b"1"), ("b", b"2")):
        (tmp_path / name / "llava").mkdir(parents=True)
        (tmp_path / name / "llava" / "model.safetensors").write_bytes(weights)
    first = tmp_path / "a" / "llava"
    names = {folder(first), folder(tmp_path / "b" / "llava")}
    names.add(folder(first, model.model_copy(update={"prompt_style": "vicuna_v1"})))
    before = folder(first)
    (first / "model.safetensors").write_bytes(b"another")
    assert len(names | {folder(first)}) == 4
    assert before in names


def test_stage_1_moves_a_bfloat16_projector_as_far_as_a_float32_one(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Steps of 1e-4 are below what bfloat16 weights of this size can hold."""
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Blue."}]
    (tmp_path / "t.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}] * 2))
    data = DataSection(train=[str(tmp_path / "t.json")], image_folder=str(tmp_path))
    settings = {"max_steps": 40, "learning_rate": 1e-4, "lr_scheduler_type": "constant",
                "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    section = AlignmentSection(train=data.train, training=settings)
    conversations, _ = read_records(tmp_path / "t.json", tmp_path)
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        vlm = load_vlm(tiny_checkpoint, dtype=dtype, prompt_style="chatml")
        projector = vlm.model.model.multi_modal_projector
        with torch.no_grad():
            projector.linear_1.weight.mul_(10)
        before = {name: value.float().clone() for name, value in projector.state_dict().items()}
        folder = tmp_path / str(dtype)
        align_projector(
            vlm, section, data, build_dataset(vlm, data, conversations),
            build_arguments(settings, folder, 0), metrics_file=folder / "metrics.jsonl",
        )  # fmt: skip
        after = projector.state_dict()
        assert {value.dtype for value in after.values()} == {dtype}
        assert set(after) == set(before)
        weight = next(name for name in before if name.endswith("linear_1.weight"))
        moved = after[weight].float() - before[weight]
        steps[dtype] = moved[before[weight].abs() > 0.1].abs().mean()
    assert steps[torch.float32] > 1e-3
    assert steps[torch.bfloat16] > 0.7 * steps[torch.float32]
