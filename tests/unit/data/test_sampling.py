import random

import pytest

from milora_vl.data.dataset import group_by_length


def sample_set(n=1000, seed=0):
    generator = random.Random(seed)
    has_image = [generator.random() < 0.7 for _ in range(n)]
    lengths = [generator.randrange(5, 300) + 576 * flag for flag in has_image]
    return lengths, has_image


def batches_of(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 333])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_order_is_a_permutation(n, batch_size):
    order = group_by_length(*sample_set(n), batch_size, seed=3)
    assert sorted(order) == list(range(n))


def test_whole_batches_hold_one_modality():
    lengths, has_image = sample_set()
    batches = batches_of(group_by_length(lengths, has_image, 16, seed=0), 16)
    mixed = [batch for batch in batches if len({has_image[index] for index in batch}) > 1]
    assert all(batch in batches[-2:] for batch in mixed)
    assert {has_image[batch[0]] for batch in batches} == {True, False}


def test_padding_is_far_below_that_of_a_random_order():
    lengths, has_image = sample_set()

    def padding(order):
        return sum(
            max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch)
            for batch in batches_of(order, 16)
        )

    shuffled = random.Random(1).sample(range(len(lengths)), len(lengths))
    assert padding(group_by_length(lengths, has_image, 16, seed=0)) < 0.15 * padding(shuffled)


def test_the_order_depends_on_seed_and_epoch_only():
    data = sample_set()
    orders = {
        (seed, epoch): group_by_length(*data, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    random.seed(99)
    assert group_by_length(*data, 8, 0, 1) == orders[0, 1]


def test_the_longest_sample_is_in_the_first_batch():
    lengths, has_image = sample_set(64 * 15)
    has_image = [index % 2 == 0 for index in range(len(lengths))]
    order = group_by_length(lengths, has_image, 16, seed=0)
    assert max(lengths) in [lengths[index] for index in order[:16]]


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="2 lengths but 1"):
        group_by_length([1, 2], [True], 1, 0)
    with pytest.raises(ValueError, match="at least 1"):
        group_by_length([1], [True], 0, 0)
