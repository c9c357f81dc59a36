import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milora_vl.constants import IGNORE_INDEX
from milora_vl.data.collate import pad_batch

PAD = 2  # the end token too, as in SmolLM2
IMAGE_ID, N_IMAGE, SIDE = 63, 4, 28  # of the tiny model

samples_of_any_length = st.lists(
    st.lists(st.tuples(st.integers(0, 62), st.booleans()), min_size=1, max_size=9).map(
        lambda pairs: {
            "input_ids": [token for token, _ in pairs],
            "labels": [token if learned else IGNORE_INDEX for token, learned in pairs],
        }
    ),
    min_size=1,
    max_size=4,
)


def text_sample(length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (length,), generator=generator).tolist()
    ids[-1] = PAD
    labels = [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]
    return {"input_ids": ids, "labels": labels}


def image_sample(length, seed, n_images=1):
    sample = text_sample(length, seed)
    image = [IMAGE_ID] * N_IMAGE * n_images
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": image + sample["input_ids"],
        "labels": [IGNORE_INDEX] * len(image) + sample["labels"],
        "pixel_values": torch.randn(n_images, 3, SIDE, SIDE, generator=generator),
    }


@settings(max_examples=60, deadline=None)
@given(
    samples=samples_of_any_length,
    side=st.sampled_from(["right", "left"]),
)
def test_the_mask_selects_exactly_the_sample_and_nothing_else_is_learned(samples, side):
    batch = pad_batch(samples, PAD, side)
    assert batch["input_ids"].shape[1] == max(len(sample["input_ids"]) for sample in samples)
    for row, sample in enumerate(samples):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == sample["input_ids"]
        assert batch["labels"][row][real].tolist() == sample["labels"]
        assert (batch["labels"][row][~real] == IGNORE_INDEX).all()
        assert (batch["input_ids"][row][~real] == PAD).all()
        edge = real.long().diff()
        assert (edge <= 0).all() if side == "right" else (edge >= 0).all()


def test_the_end_token_is_learned_although_it_is_the_padding_token():
    batch = pad_batch([text_sample(4, 0), text_sample(9, 1)], PAD)
    assert batch["input_ids"][0, 3] == batch["labels"][0, 3] == PAD
    assert batch["attention_mask"][0].tolist() == [1] * 4 + [0] * 5
    assert (batch["labels"] == PAD).sum() == 2


def test_images_are_joined_in_order_and_absent_without_any():
    samples = [image_sample(5, 0, n_images=2), text_sample(7, 1), image_sample(3, 2)]
    batch = pad_batch(samples, PAD)
    expected = torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]])
    assert torch.equal(batch["pixel_values"], expected)
    assert "pixel_values" not in pad_batch(samples[1:2], PAD)


def test_tensors_and_lists_and_missing_labels():
    sample = text_sample(5, 0)
    tensors = {key: torch.tensor(value) for key, value in sample.items()}
    for key, value in pad_batch([sample], PAD).items():
        assert torch.equal(value, pad_batch([tensors], PAD)[key])
        assert value.dtype == torch.long
    assert "labels" not in pad_batch([{"input_ids": [1, 2]}], PAD)


def test_samples_that_are_left_out_leave_no_trace():
    gone = {"input_ids": [PAD], "labels": [IGNORE_INDEX], "skipped": True}
    samples = [image_sample(5, 0), text_sample(7, 1)]
    for key, value in pad_batch([gone, samples[0], gone, samples[1]], PAD).items():
        assert torch.equal(value, pad_batch(samples, PAD)[key])
    empty = pad_batch([gone, gone], PAD)
    assert empty["input_ids"].shape == (1, 1)
    assert (empty["labels"] == IGNORE_INDEX).all()


def test_bad_samples_are_errors():
    with pytest.raises(ValueError, match="at least one"):
        pad_batch([], PAD)
    with pytest.raises(ValueError, match="side"):
        pad_batch([text_sample(3, 0)], PAD, side="top")
    with pytest.raises(ValueError, match=r"sample 1 .* 3 input_ids but none"):
        pad_batch([text_sample(3, 0), {"input_ids": [1, 2, 3]}], PAD)
    with pytest.raises(ValueError, match=r"sample 0 .* 2 input_ids but 1"):
        pad_batch([{"input_ids": [1, 2], "labels": [1]}], PAD)


# --- with the model -----------------------------------------------------------------------------


def supervised_after_first(sample):
    return sum(label != IGNORE_INDEX for label in sample["labels"][1:])


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_loss_is_the_token_weighted_mean_of_single_losses(tiny_vlm, side):
    samples = [image_sample(5, 0), text_sample(11, 1), image_sample(8, 2, n_images=2)]
    with torch.no_grad():
        batch_loss = tiny_vlm(**pad_batch(samples, PAD, side)).loss
        singles = [tiny_vlm(**pad_batch([sample], PAD)).loss for sample in samples]
    weights = torch.tensor([supervised_after_first(sample) for sample in samples])
    expected = (torch.stack(singles) * weights).sum() / weights.sum()
    torch.testing.assert_close(batch_loss, expected, atol=1e-5, rtol=0)
