import time

import pytest
import torch
from chat_tokenizers import build_byte_level
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

from milora_vl.constants import IGNORE_INDEX, IMAGE_TOKEN
from milora_vl.data.collate import pad_batch
from milora_vl.data.dataset import ConversationDataset, mix
from milora_vl.data.encode import image_token_id
from milora_vl.data.images import BadImageError, ImageTransform
from milora_vl.data.records import Conversation, RecordError, Turn

SIDE, N_IMAGE = 28, 4
PROCESSOR = CLIPImageProcessor(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
)


def conversation(index, n_images=1, words=3):
    question = f"{IMAGE_TOKEN}\n" * n_images + "What?"
    turns = (Turn("user", question), Turn("assistant", f"A fox {index}" + " and" * words))
    return Conversation(str(index), turns, (f"{index}.png",) * n_images, f"train.json[{index}]")


@pytest.fixture
def make_dataset(tmp_path):
    for index in range(6):
        Image.new("RGB", (20, 10), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")

    def build(conversations=None, **options):
        if conversations is None:
            conversations = [conversation(i, n_images=i % 3, words=2 * i) for i in range(6)]
        return ConversationDataset(
            conversations,
            tmp_path,
            ImageTransform(PROCESSOR),
            "chatml",
            build_byte_level(),
            N_IMAGE,
            **options,
        )

    return build


def test_an_item_has_one_picture_for_each_run_of_image_tokens(make_dataset):
    dataset = make_dataset()
    image_id = image_token_id(dataset.tokenizer)
    for index in range(len(dataset)):
        item = dataset[index]
        n_images = index % 3
        assert item["input_ids"].count(image_id) == n_images * N_IMAGE
        assert len(item["labels"]) == len(item["input_ids"])
        assert ("pixel_values" in item) == bool(n_images)
        if n_images:
            assert item["pixel_values"].shape == (n_images, 3, SIDE, SIDE)
            assert item["pixel_values"].dtype == torch.float32


def test_lengths_and_flags_are_those_of_the_items(make_dataset):
    for options in ({}, {"max_length": 24}):
        dataset = make_dataset(**options)
        assert dataset.lengths == [len(item["input_ids"]) for item in dataset]
        assert dataset.has_image == ["pixel_values" in item for item in dataset]


def test_lengths_of_four_thousand_records_take_seconds_and_no_picture(make_dataset):
    dataset = make_dataset([conversation(10_000 + index) for index in range(4000)])
    started = time.process_time()
    assert len(dataset.lengths) == 4000
    assert time.process_time() - started < 8


def test_indices_end_where_the_data_set_ends(make_dataset):
    dataset = make_dataset()
    assert len(list(dataset)) == len(dataset)
    assert dataset[-1]["input_ids"] == dataset[5]["input_ids"]
    with pytest.raises(IndexError):
        dataset[6]


def break_picture(tmp_path, index):
    (tmp_path / f"{index}.png").write_bytes(b"\x89PNG broken")


def test_an_unreadable_picture_names_record_and_file(make_dataset, tmp_path):
    break_picture(tmp_path, 4)
    with pytest.raises(BadImageError, match=r"train\.json\[4\].*4\.png"):
        make_dataset()[4]


def test_a_data_set_without_a_readable_image_is_an_error(make_dataset, tmp_path):
    break_picture(tmp_path, 1)
    with pytest.raises(ValueError, match=r"data set is empty.*unreadable image.*1"):
        make_dataset([conversation(1)], on_bad_image="skip")


def test_a_record_that_does_not_fit_names_itself_and_the_numbers(make_dataset):
    dataset = make_dataset(max_length=12)
    with pytest.raises(RecordError, match=r"train\.json\[1\]: .* max_length 12 .* of \d+"):
        _ = dataset.lengths


def test_records_that_do_not_fit_can_be_left_out_and_are_counted(make_dataset):
    shortest = min(range(6), key=lambda index: make_dataset().lengths[index])
    dataset = make_dataset(max_length=make_dataset().lengths[shortest], on_bad_length="skip")
    assert 0 < len(dataset) < 6
    assert sum(dataset.skipped.values()) == 6 - len(dataset)
    assert max(dataset.lengths) <= dataset.max_length
    with pytest.raises(ValueError, match="empty"):
        make_dataset(max_length=2, on_bad_length="skip")


@pytest.mark.parametrize("option", ["on_bad_image", "on_bad_length", "special_tokens_in_answers"])
def test_unknown_options_are_errors(make_dataset, option):
    with pytest.raises(ValueError, match=option):
        make_dataset(**{option: "ignore"})


def test_images_need_a_folder():
    dataset = ConversationDataset(
        [conversation(0)], None, ImageTransform(PROCESSOR), "chatml", build_byte_level(), 1
    )
    with pytest.raises(ValueError, match=r"train\.json\[0\].*no image folder"):
        dataset[0]


# --- special tokens in answers --------------------------------------------------------------------


def boxed(index, answer):
    turns = (Turn("user", "Where is <|im_start|>?"), Turn("assistant", answer))
    return Conversation(str(index), turns, (), f"train.json[{index}]")


BOXED = [boxed(0, "<|im_start|>(1,2)"), boxed(1, "nowhere"), boxed(2, "<s> <image> <|im_start|>")]


def test_special_tokens_in_answers_are_told_once_with_a_count(make_dataset, caplog):
    make_dataset(BOXED)
    (line,) = caplog.messages
    assert "2 of 3 records (first: train.json[0]; <|im_start|>, <s>) are read as char" in line
    assert "data.special_tokens_in_answers: token" in line
    caplog.clear()
    make_dataset(BOXED[1:2])
    assert not caplog.messages


def test_special_tokens_in_answers_are_tokens_if_asked_and_images_never(make_dataset):
    literal = make_dataset(BOXED)
    tokens = make_dataset(BOXED, special_tokens_in_answers="token")
    tokenizer = tokens.tokenizer
    box, start = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<s>"])
    n_turns = literal[1]["input_ids"].count(box)
    for index, n_boxes in enumerate((1, 0, 1)):
        assert literal[index]["input_ids"].count(box) == n_turns
        assert tokens[index]["input_ids"].count(box) == n_turns + n_boxes
        assert tokens[index]["labels"].count(box) == n_boxes
        assert image_token_id(tokenizer) not in tokens[index]["input_ids"]
    assert tokens[2]["labels"].count(start) == 1


# --- worker processes -----------------------------------------------------------------------------


def test_worker_processes_give_the_same_batches(make_dataset):
    dataset = make_dataset()

    def collect(workers):
        loader = DataLoader(
            dataset, batch_size=3, num_workers=workers, collate_fn=collate_for_workers
        )
        return list(loader)

    for here, there in zip(collect(0), collect(1), strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)


def collate_for_workers(samples):
    return pad_batch(samples, pad_token_id=0)


# --- mixtures -----------------------------------------------------------------------------------


def answers(dataset):
    return [tuple(label for label in item["labels"] if label != IGNORE_INDEX) for item in dataset]


def test_a_mixture_takes_every_sample_once(make_dataset):
    first = make_dataset([conversation(i, 0) for i in range(10)])
    second = make_dataset([conversation(100 + i, 0) for i in range(4)])
    mixed = answers(mix([first, second], seed=0))
    assert sorted(mixed) == sorted(answers(first) + answers(second))
    assert mixed != answers(first) + answers(second)


def test_a_mixture_knows_lengths_and_modality(make_dataset):
    mixed = mix([make_dataset(), make_dataset([conversation(1)])], seed=0)
    assert mixed.lengths == [len(item["input_ids"]) for item in mixed]
    assert mixed.has_image == ["pixel_values" in item for item in mixed]


def test_a_mixture_depends_on_its_seed_only(make_dataset):
    dataset = make_dataset()
    places = [mix([dataset], seed).places for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
