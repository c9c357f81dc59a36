"""Laws of leaving out: what cannot be read is gone, counted, and nothing stands in for it."""

import json
from pathlib import Path

import pytest
import torch
from family_models import BUILDERS, build_checkpoint
from PIL import Image

from milora_vl.config import DataSection, MiloraConfig, ProjectorSection
from milora_vl.data.images import BadImageError
from milora_vl.data.records import Conversation, RecordError, Turn
from milora_vl.model.load import VLM, load_vlm
from milora_vl.training.arguments import build_arguments
from milora_vl.training.inputs import build_collate, build_dataset, load_conversations
from milora_vl.training.run import finetune
from milora_vl.training.trainer import token_loss_sum

FAMILIES = ["llava", "llava_next", "qwen2_vl", "idefics3", "paligemma", "gemma3", "mllama"]


def noise(path: Path, width: int, height: int) -> None:
    generator = torch.Generator().manual_seed(width)
    pixels = torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name in BUILDERS])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return load_vlm(build_checkpoint(request.param, folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    noise(made / "a.png", 40, 30)
    noise(made / "long.png", 300, 1)
    whole = (made / "a.png").read_bytes()
    (made / "no_header.png").write_bytes(whole[:10])
    (made / "cut.png").write_bytes(whole[: len(whole) // 2])  # the header is good
    noise(made / "b.jpg", 30, 40)
    return made


def talk(number: int, image: str | None) -> Conversation:
    mark = "<image>\n" if image else ""
    turns = (Turn("user", f"{mark}What?"), Turn("assistant", f"It is {number}."))
    return Conversation(str(number), turns, (image,) if image else (), f"made.json[{number}]")


def build(vlm: VLM, folder: Path, talks: list[Conversation], **options: str):
    section = DataSection(train=["made.json"], image_folder=str(folder), **options)
    return build_dataset(vlm, section, talks)


TALKS = [
    talk(0, "a.png"), talk(1, "no_header.png"), talk(2, None), talk(3, "cut.png"), talk(4, "b.jpg"),
    talk(5, "missing.png"),
]  # fmt: skip


def test_what_headers_tell_is_left_out_and_counted_before_training(vlm, folder, caplog):
    dataset = build(vlm, folder, TALKS, on_bad_image="skip")
    assert [one.id for one in dataset.conversations] == ["0", "2", "3", "4"]
    assert dataset.skipped == {"unreadable image": 2}
    assert "2 records skipped: unreadable image" in caplog.messages
    for where in ("made.json[1]", "made.json[5]"):
        assert any(where in message for message in caplog.messages)
    assert dataset.has_image == [True, False, True, True]
    samples = [dataset[index] for index in (0, 1, 3)]
    assert [dataset.lengths[index] for index in (0, 1, 3)] == [len(x["input_ids"]) for x in samples]
    assert [bool(x.get("image_inputs") or "pixel_values" in x) for x in samples] == [1, 0, 1]


def test_a_decoding_error_drops_the_sample_from_its_batch(vlm, folder, caplog):
    dataset = build(vlm, folder, TALKS, on_bad_image="skip")
    collate = build_collate(vlm)
    batch = collate([dataset[2], dataset[0], dataset[2]])
    alone = collate([dataset[0]])
    assert batch.keys() == alone.keys()
    assert all(torch.equal(batch[name], alone[name]) for name in alone)
    assert any("made.json[3]" in message and "cut.png" in message for message in caplog.messages)
    with pytest.raises(BadImageError, match=r"made\.json\[3\].*cut\.png"):
        build(vlm, folder, TALKS[3:4])[0]


def test_a_batch_of_nothing_has_a_loss_of_zero_and_no_gradient(vlm, folder):
    dataset = build(vlm, folder, TALKS, on_bad_image="skip")
    vlm.model.train()
    vlm.model.zero_grad()
    loss, n_tokens = token_loss_sum(vlm.model, build_collate(vlm)([dataset[2]]))
    assert (loss.item(), n_tokens.item()) == (0.0, 0)
    loss.backward()
    gradients = [p.grad for p in vlm.model.parameters() if p.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_shape_that_the_processor_refuses_is_left_out(vlm, folder):
    talks = [talk(0, "a.png"), talk(1, "long.png")]
    dataset = build(vlm, folder, talks, on_bad_image="skip")
    refused = len(dataset) == 1
    assert dataset.skipped == ({"unreadable image": 1} if refused else {})
    assert not any(sample.get("skipped") for sample in dataset)
    if refused:
        with pytest.raises(BadImageError, match=r"made\.json\[1\].*300 x 1 px"):
            _ = build(vlm, folder, talks).lengths


def test_missing_images_are_left_out_with_the_unreadable_ones(vlm, folder, tmp_path):
    records = [
        {"mood": "x", "image": image, "query": "What?", "response": "A fox."}
        for image in ("a.png", "missing.png")
    ]
    file = str(tmp_path / "made.json")
    Path(file).write_text(json.dumps(records), encoding="utf-8")
    options = {"train": [file], "image_folder": str(folder), "ignore_keys": ["mood"]}
    section = DataSection(**options, on_bad_image="skip")
    dataset = build_dataset(vlm, section, load_conversations(section, file))
    assert len(dataset) == 1
    assert dataset.skipped == {"unreadable image": 1}
    with pytest.raises(RecordError, match=r"made.json\[1\]: image file missing"):
        load_conversations(DataSection(**options), file)


def test_training_goes_on_over_steps_without_a_readable_image(tiny_checkpoint, folder, tmp_path):
    vlm = load_vlm(tiny_checkpoint, dtype=torch.float32, prompt_style="chatml")
    talks = [talk(0, "a.png"), *(talk(number, "cut.png") for number in range(1, 4))]
    dataset = build(vlm, folder, talks, on_bad_image="skip")
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    finetune(
        vlm,
        MiloraConfig(r=4),
        dataset,
        None,
        build_arguments(settings, tmp_path / "checkpoints", 0),
        run_folder=tmp_path,
        projector=ProjectorSection(),
    )
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss_nats_per_token"] for line in lines if "loss_nats_per_token" in line]
    assert len(losses) == 4
    assert losses.count(0.0) == 3
    assert max(losses) > 0
    with pytest.raises(ValueError, match="no image of the training data can be read"):
        finetune(
            load_vlm(tiny_checkpoint, prompt_style="chatml"),
            MiloraConfig(r=4),
            build(vlm, folder, talks[1:], on_bad_image="skip"),
            None,
            build_arguments(settings, tmp_path / "checkpoints", 0),
            run_folder=tmp_path / "other",
            projector=ProjectorSection(),
        )
