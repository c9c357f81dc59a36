"""Confidence intervals by the bootstrap over groups: answers on one image are not independent."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_CELLS_PER_CHUNK = 4_000_000
N_RESAMPLES = 2000


def sum_by_group(values: Array | Sequence[Sequence[float]], groups: Sequence[str]) -> Array:
    """Add up rows that belong to one group.

    Args:
        values: [n, k].
        groups: n labels.

    Returns:
        [G, k], groups in alphabetical order.

    Raises:
        ValueError: If the lengths differ.
    """
    table = np.asarray(values, dtype=np.float64)
    if len(table) != len(groups):
        raise ValueError(f"{len(table)} values but {len(groups)} group labels")
    _, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.zeros((index.max() + 1 if len(index) else 0, table.shape[1]))
    np.add.at(sums, index, table)
    return sums


def ratio(sums: Array) -> Array:
    """Return column 0 over column 1: values over their counts, [R, 2] -> [R]."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] > 0)


def total(sums: Array, statistic: Callable[[Array], Array] = ratio) -> float:
    """Return a statistic of the column sums over all groups, [G, k] -> a number."""
    return float(statistic(sums.sum(axis=0, keepdims=True))[0])


def bootstrap_interval(
    sums: Array,
    statistic: Callable[[Array], Array] = ratio,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic of column sums, resampling groups.

    Args:
        sums: [G, k], one row a group (``sum_by_group``).
        statistic: [R, k] column sums of R resamples -> [R] values.
        n_resamples: Resamples drawn.
        seed: Of the draw; the same seed gives the same interval.

    Returns:
        Low and high end. With a single group both are its value.

    Raises:
        ValueError: If there is no group.
    """
    values = _resample(sums, statistic, n_resamples, seed)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resample(
    sums: Array, statistic: Callable[[Array], Array], n_resamples: int, seed: int
) -> Array:
    """Return the statistic of each resample of groups, [n_resamples]."""
    n_groups = len(sums)
    if n_groups == 0:
        raise ValueError("an interval needs at least one group")
    rng = np.random.default_rng(seed)
    # in chunks: the table of draws may be larger than memory
    step = max(1, _CELLS_PER_CHUNK // n_groups)
    values = []
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        # how often each group is drawn: one product then sums all resamples
        times = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=size)
        values.append(statistic(times.astype(np.float64) @ sums))
    return np.concatenate(values)


def mean_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of a mean, resampling ``groups`` (default: every value alone)."""
    table = np.column_stack([np.asarray(values, dtype=np.float64), np.ones(len(values))])
    sums = table if groups is None else sum_by_group(table, groups)
    return bootstrap_interval(sums, ratio, seed=seed)


def difference_interval(
    before: Array, after: Array, statistic: Callable[[Array], Array] = ratio, *, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of ``paired_bootstrap`` alone."""
    low, high, _ = paired_bootstrap(before, after, statistic, seed=seed)
    return low, high


def paired_bootstrap(
    before: Array, after: Array, statistic: Callable[[Array], Array] = ratio, *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the 95 % interval of ``statistic(after) - statistic(before)``, paired by group.

    The third number is the two-sided p-value of no difference: twice the share of resamples on the
    rarer side of zero, those at zero counted half; no smaller than 1 in the number of resamples.

    Args:
        before: [G, k].
        after: [G, k], the same groups in the same order.
        statistic: As in ``bootstrap_interval``.
        seed: Of the draw.

    Raises:
        ValueError: If the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"not the same groups: {before.shape} before, {after.shape} after")
    width = before.shape[1]
    # side by side, so that a resample draws the same groups of both
    both = np.hstack([before, after])
    values = _resample(
        both,
        lambda sums: statistic(sums[:, width:]) - statistic(sums[:, :width]),
        N_RESAMPLES,
        seed,
    )
    low, high = np.percentile(values, [2.5, 97.5])
    side = min(np.mean(values < 0), np.mean(values > 0)) + np.mean(values == 0) / 2
    return float(low), float(high), float(np.clip(2 * side, 1 / N_RESAMPLES, 1.0))
