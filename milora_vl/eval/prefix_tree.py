"""Token sequences that begin alike, laid out so that a common beginning is computed once.

The rows of a tree become one sequence of nodes: each distinct prefix is there once, and a node may
attend to its ancestors only. With causal attention that is exact: a token's state depends only on
the tokens before it in its own row.

    row 0:  a b c d            nodes      a b c d e f
    row 1:  a b e f            positions  0 1 2 3 2 3
                               f attends  a b     e f
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PrefixTree:
    """Rows of token ids with shared beginnings.

    Attributes:
        rows: Caller's numbers of the rows, in the order of ``leaves``.
        input_ids: [N] token of each node.
        positions: [N] place of the node in its row or rows.
        attends: [N, N] whether the first node attends to the second.
        leaves: For each row the node of its last token.
    """

    rows: tuple[int, ...]
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    attends: NDArray[np.bool_]
    leaves: tuple[int, ...]


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def build_tree(
    ids: Sequence[Sequence[int]], rows: Sequence[int], *, share: bool = True
) -> PrefixTree:
    """Lay out some rows.

    Args:
        ids: Token ids of all rows.
        rows: Which of them go into this tree; sorted by ids, they share the most.
        share: Whether common beginnings are shared; without it a row shares nothing.

    Raises:
        ValueError: If a row is empty.
    """
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, NDArray[np.int64]]] = []
    leaves: list[int] = []
    path = np.zeros(0, dtype=np.int64)  # nodes of the row before
    previous: Sequence[int] = ()
    for row in rows:
        current = ids[row]
        if not current:
            raise ValueError(f"row {row} has no token")
        common = count_common(previous, current) if share else 0
        start, end = len(tokens), len(tokens) + len(current) - common
        tokens += current[common:]
        positions += range(common, len(current))
        spans.append((start, end, path[:common]))
        path = np.concatenate([path[:common], np.arange(start, end)])
        leaves.append(int(path[-1]))
        previous = current
    attends = np.zeros((len(tokens), len(tokens)), dtype=bool)
    for start, end, ancestors in spans:
        attends[start:end, ancestors] = True
        attends[start:end, start:end] = np.tri(end - start, dtype=bool)
    return PrefixTree(
        rows=tuple(rows),
        input_ids=np.array(tokens, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        attends=attends,
        leaves=tuple(leaves),
    )


def plan_trees(
    ids: Sequence[Sequence[int]],
    groups: Sequence[str | None],
    *,
    max_rows: int,
    max_nodes: int,
    share: bool = True,
) -> list[list[int]]:
    """Divide rows into trees: rows of one group (one picture), neighbours in alphabetical order.

    Args:
        ids: Token ids of each row.
        groups: What a row may share its beginning with; image tokens of two pictures are equal, so
            rows of different pictures must be in different groups.
        max_rows: Most rows in a tree.
        max_nodes: Most nodes a tree has beyond those of its first row, since attention grows with
            their square. The first row does not count: with hundreds of image tokens it is where
            sharing pays most.
        share: Whether rows share at all; without it every row is a tree.

    Returns:
        Row numbers of each tree; trees of one group are neighbours.
    """
    order = sorted(range(len(ids)), key=lambda row: (groups[row] or "", ids[row]))
    trees: list[list[int]] = []
    n_added = 0
    for row in order:
        previous = trees[-1][-1] if trees else None
        if share and previous is not None and groups[previous] == groups[row]:
            added = len(ids[row]) - count_common(ids[previous], ids[row])
            if len(trees[-1]) < max_rows and n_added + added <= max_nodes:
                trees[-1].append(row)
                n_added += added
                continue
        trees.append([row])
        n_added = 0
    return trees
