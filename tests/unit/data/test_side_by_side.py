"""Laws of exchanges side by side: each is what it is alone, and none sees another."""

import pytest
import torch
from chat_tokenizers import ALL, build, build_byte_level
from torch.testing import assert_close

from milora_vl.constants import IGNORE_INDEX, IMAGE_TOKEN
from milora_vl.data.collate import pad_batch
from milora_vl.data.encode import encode, encode_side_by_side
from milora_vl.data.records import Turn
from milora_vl.training.trainer import token_loss_sum

N_IMAGE = 4
QUESTIONS = ("What is it?", "Is it red?\nOne word.", "Is it a fox?")
ANSWERS = ("A red fox.", "Yes", "No, two")
STYLES = ("vicuna_v1", "chatml", "llava_llama_2", "mistral")


def talk(image: str = f"{IMAGE_TOKEN}\n", system: bool = False) -> list[Turn]:
    turns = [Turn("system", "Be brief.")] if system else []
    for place, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        text = image + question if place == 0 else question
        turns += [Turn("user", text), Turn("assistant", answer)]
    return turns


def alone(style: str, tokenizer, counts: list[int], image: str = f"{IMAGE_TOKEN}\n"):
    return [
        encode(
            [Turn("user", image + question), Turn("assistant", answer)], style, tokenizer, counts
        )
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]


def branch(encoded, number: int) -> tuple[list[int], list[int]]:
    kept = [i for i, each in enumerate(encoded.branches) if each in (0, number)]
    return [encoded.input_ids[i] for i in kept], [encoded.labels[i] for i in kept]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("image", [f"{IMAGE_TOKEN}\n", ""])
def test_each_branch_is_its_exchange_alone(style, kind, image):
    tokenizer = build(kind)
    counts = [N_IMAGE] if image else []
    encoded = encode_side_by_side(talk(image), style, tokenizer, counts)
    for number, row in enumerate(alone(style, tokenizer, counts, image), start=1):
        assert branch(encoded, number) == (row.input_ids, row.labels)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert encoded.input_ids.count(image_id) == len(counts) * N_IMAGE  # there once


def test_the_system_text_is_shared():
    tokenizer = build_byte_level()
    encoded = encode_side_by_side(talk(system=True), "chatml", tokenizer, [N_IMAGE])
    begin = [t for t, b in zip(encoded.input_ids, encoded.branches, strict=True) if b == 0]
    assert "Be brief." in tokenizer.decode(begin)
    assert set(encoded.branches) == {0, 1, 2, 3}


def test_equal_exchanges_stay_apart():
    tokenizer = build_byte_level()
    turns = [Turn("user", "Same?"), Turn("assistant", "Yes")] * 2
    encoded = encode_side_by_side(turns, "chatml", tokenizer, [])
    first, second = (branch(encoded, number) for number in (1, 2))
    assert first == second
    assert sum(label != IGNORE_INDEX for label in encoded.labels) == 2 * sum(
        label != IGNORE_INDEX for label in first[1]
    )


def test_exchanges_that_do_not_fit_are_dropped_whole():
    tokenizer = build_byte_level()
    full = encode_side_by_side(talk(), "chatml", tokenizer, [N_IMAGE])
    n_first_two = sum(number <= 2 for number in full.branches)
    cut = encode_side_by_side(talk(), "chatml", tokenizer, [N_IMAGE], n_first_two + 3)
    assert cut.input_ids == full.input_ids[:n_first_two]
    assert cut.labels == full.labels[:n_first_two]


def test_one_exchange_or_a_later_image_runs_on_as_before():
    tokenizer = build_byte_level()
    later = talk()
    later[2] = Turn("user", f"And {IMAGE_TOKEN}?")
    for turns, counts in ((talk()[:2], [N_IMAGE]), (later, [N_IMAGE, N_IMAGE])):
        assert encode_side_by_side(turns, "chatml", tokenizer, counts) == encode(
            turns, "chatml", tokenizer, counts
        )


def samples(turns: list[Turn], make, pixel_values: torch.Tensor) -> dict:
    tokenizer = build_byte_level()
    encoded = make(turns, "chatml", tokenizer, [N_IMAGE])
    sample = {"input_ids": encoded.input_ids, "labels": encoded.labels}
    return sample | {"branches": encoded.branches, "pixel_values": pixel_values}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_the_sum_of_the_exchanges_alone(tiny_checkpoint, attention):
    from milora_vl.model.load import load_vlm

    model = load_vlm(tiny_checkpoint, attn_implementation=attention).model
    pictures = torch.randn(2, 1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    other = [Turn("user", f"{IMAGE_TOKEN}\nA longer question than those?"), Turn("assistant", "No")]
    together = [
        samples(talk(), encode_side_by_side, pictures[0]),
        samples(other, encode_side_by_side, pictures[1]),  # a running row in the same batch
    ]
    singles = [samples(other, encode, pictures[1])]
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        turns = [Turn("user", f"{IMAGE_TOKEN}\n{question}"), Turn("assistant", answer)]
        singles.append(samples(turns, encode, pictures[0]))
    with torch.no_grad():
        loss, n_tokens = token_loss_sum(model, pad_batch(together, pad_token_id=0))
        parts = [token_loss_sum(model, pad_batch([single], pad_token_id=0)) for single in singles]
    assert n_tokens == sum(part[1] for part in parts)
    assert_close(loss, sum(part[0] for part in parts), atol=1e-4, rtol=1e-5)


def test_no_exchange_sees_another(tiny_checkpoint):
    from milora_vl.model.load import load_vlm

    model = load_vlm(tiny_checkpoint).model
    sample = samples(talk(), encode_side_by_side, torch.zeros(1, 3, 28, 28))
    batch = pad_batch([sample], pad_token_id=0)
    batch.pop("labels")
    changed = {name: value.clone() for name, value in batch.items()}
    second = torch.tensor(sample["branches"]) == 2
    changed["input_ids"][0, second] = 7
    with torch.no_grad():
        before, after = model(**batch).logits[0], model(**changed).logits[0]
    assert torch.equal(before[~second], after[~second])
    assert not torch.equal(before[second], after[second])


def test_branches_are_padded_on_the_right_only():
    sample = samples(talk(), encode_side_by_side, torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match="on the right"):
        pad_batch([sample], pad_token_id=0, side="left")
