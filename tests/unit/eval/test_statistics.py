import numpy as np
import pytest

from milora_vl.eval.statistics import (
    bootstrap_interval,
    difference_interval,
    mean_interval,
    ratio,
    sum_by_group,
)


def test_interval_holds_the_mean_and_narrows_with_the_square_root_of_n():
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 1600):
        values = (rng.random(n) < 0.6).astype(float)
        low, high = mean_interval(values)
        assert low < values.mean() < high
        widths.append(high - low)
        normal = 2 * 1.96 * values.std() / n**0.5
        assert high - low == pytest.approx(normal, rel=0.15)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.2)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    samples = (rng.random((100, 150)) < 0.3).astype(float)
    hits = [low <= 0.3 <= high for low, high in map(mean_interval, samples)]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_same_seed_same_interval():
    values = [0.0, 1, 1, 0, 1]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)


def test_copies_in_a_group_add_no_certainty():
    values = (np.random.default_rng(2).random(80) < 0.5).astype(float)
    groups = [str(index) for index in range(80)]
    once = mean_interval(values, groups)
    four_times = mean_interval(np.tile(values, 4), groups * 4)
    assert four_times == pytest.approx(once)
    as_if_independent = mean_interval(np.tile(values, 4))
    assert np.diff(as_if_independent) < 0.7 * np.diff(once)


def test_all_equal_values_have_no_width_and_empty_is_an_error():
    assert mean_interval([1.0, 1.0]) == (1, 1)
    with pytest.raises(ValueError, match="one group"):
        bootstrap_interval(np.zeros((0, 2)))


def test_group_sums():
    sums = sum_by_group([[1.0, 1], [2, 1], [4, 1]], ["b", "a", "b"])
    np.testing.assert_array_equal(sums, [[2, 1], [5, 2]])
    with pytest.raises(ValueError, match="labels"):
        sum_by_group([[1.0]], ["a", "b"])


def test_many_groups_give_the_same_interval_as_the_plain_formula():
    sums = np.column_stack([np.arange(3000) % 2, np.ones(3000)]).astype(float)
    low, high = bootstrap_interval(sums, n_resamples=3000)  # drawn in several chunks
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.005)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 3000**0.5, rel=0.1)


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(4)
    before = (rng.random(300) < 0.5).astype(float)
    after = np.where(rng.random(300) < 0.1, 1.0, before)
    tables = [np.column_stack([values, np.ones(300)]) for values in (before, after)]
    low, high = difference_interval(*tables, ratio)
    assert 0 < low < after.mean() - before.mean() < high
    shuffled = tables[1][rng.permutation(300)]
    assert high - low < 0.6 * np.subtract(*difference_interval(tables[0], shuffled, ratio)[::-1])
    with pytest.raises(ValueError, match="same groups"):
        difference_interval(tables[0], tables[1][:10])
