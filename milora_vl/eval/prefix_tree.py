"""Greedy decoding of many prompts at once, where what they have in common is computed once.

The prompts become one sequence of nodes: each distinct prefix is there once, and a node may attend
to its ancestors only. With causal attention that is exact: a token's state depends only on the
tokens before it in its own row.

    row 0:  a b c d            nodes      a b c d e f
    row 1:  a b e f            positions  0 1 2 3 2 3
                               f attends  a b     e f

One forward pass computes all nodes of a batch of trees, then one pass a token extends the rows that
have not ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from milora_vl.eval.items import NonFiniteError


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
        # causal among the row's own nodes
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
    """Divide rows into trees: rows of one group (one image), neighbours in alphabetical order.

    Args:
        ids: Token ids of each row.
        groups: What a row may share its beginning with; image tokens of two images are equal, so
            rows of different images must be in different groups.
        max_rows: Most rows in a tree.
        max_nodes: Most nodes a tree has beyond those of its first row, since attention grows with
            their square. The first row does not count: with hundreds of image tokens it is where
            sharing pays most.
        share: Whether rows share at all; without it every row is a tree.

    Returns:
        Row numbers of each tree; trees of one group are neighbours.
    """
    # sorted by tokens, neighbors share the longest beginnings
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


def generate_over_trees(
    model: LlavaForConditionalGeneration,
    trees: Sequence[PrefixTree],
    features: Sequence[Tensor | None],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
) -> dict[int, list[int]]:
    """Decode every row of some trees greedily.

    Args:
        model: In evaluation mode; its attention must take a 4-D mask ("sdpa" or "eager").
        trees: One batch.
        features: For each tree the projected image [P, D] that its image tokens stand for.
        max_new_tokens: Limit for each row.
        stop_ids: Tokens that end a row; the one that did is kept as the last token.

    Returns:
        New tokens by row number.

    Raises:
        ValueError: If image tokens and features disagree in number.
        NonFiniteError: If the logits of a row are NaN or infinite.
    """
    cache = DynamicCache()
    hidden = _prefill(model, trees, features, cache)
    state = _Rows(trees)
    leaves = torch.from_numpy(state.columns).to(hidden.device)
    logits = _logits(model, hidden[torch.from_numpy(state.tree_of).to(hidden.device), leaves])
    for step in range(max_new_tokens):
        state.append(_most_likely(logits, state.live), stop_ids)
        if not len(state.tree_of) or step + 1 == max_new_tokens:
            break
        # a tree whose rows have all ended would be computed for nothing
        kept = state.compact_trees()
        if kept is not None:
            cache.batch_select_indices(torch.from_numpy(kept).to(hidden.device))
        hidden = _step(model, state, cache)
        slots = torch.from_numpy(state.slots()).to(hidden.device)
        trees_of_rows = torch.from_numpy(state.tree_of).to(hidden.device)
        logits = _logits(model, hidden[trees_of_rows, slots])
    return state.tokens


def tree_logits(model: LlavaForConditionalGeneration, tree: PrefixTree) -> Tensor:
    """Return the logits after the last token of each row of a tree without an image: [R, V]."""
    hidden = _prefill(model, [tree], [None], DynamicCache())
    return _logits(model, hidden[0, list(tree.leaves)])


def _most_likely(logits: Tensor, rows: Sequence[int]) -> list[int]:
    """Return the most likely token of each row: [R, V] -> R numbers."""
    # the maximum of a row is finite unless one of its logits is NaN or +inf, or all are -inf
    values, tokens = logits.max(dim=-1)
    finite = torch.isfinite(values)
    if not finite.all():
        row = rows[int((~finite).nonzero()[0])]
        raise NonFiniteError("the model's logits are not finite", row)
    return tokens.tolist()


class _Rows:
    """Rows still being decoded: ``live`` numbers, their tree, and the columns each may attend to.

    The three arrays run in parallel and shrink as rows end. A column is a place in the cache.
    """

    def __init__(self, trees: Sequence[PrefixTree]) -> None:
        self.n_trees = len(trees)
        self.width = max(len(tree.input_ids) for tree in trees)
        self.tokens: dict[int, list[int]] = {row: [] for tree in trees for row in tree.rows}
        self.live = [row for tree in trees for row in tree.rows]
        self.tree_of = np.repeat(np.arange(len(trees)), [len(tree.rows) for tree in trees])
        self.columns = np.array([leaf for tree in trees for leaf in tree.leaves])
        self.positions = np.concatenate([tree.positions[list(tree.leaves)] for tree in trees])
        self.attends = np.zeros((len(self.live), self.width), dtype=bool)
        for place, (tree, leaf) in enumerate(zip(self.tree_of, self.columns, strict=True)):
            nodes = trees[tree].attends[leaf]
            self.attends[place, : len(nodes)] = nodes

    def append(self, new: Sequence[int], stop_ids: set[int]) -> None:
        """Add one token a row and forget the rows that it ends."""
        going = []
        for place, (row, token) in enumerate(zip(self.live, new, strict=True)):
            self.tokens[row].append(token)
            if token not in stop_ids:
                going.append(place)
        self.live = [self.live[place] for place in going]
        self.tree_of, self.positions = self.tree_of[going], self.positions[going] + 1
        self.attends = self.attends[going]

    def compact_trees(self) -> NDArray[np.int64] | None:
        """Drop trees without a live row; return the old numbers of the others, None if all stay."""
        kept, self.tree_of = np.unique(self.tree_of, return_inverse=True)
        if len(kept) == self.n_trees:
            return None
        self.n_trees = len(kept)
        return kept

    def slots(self) -> NDArray[np.int64]:
        """Return each row's place among the live rows of its tree."""
        return np.array(
            [np.sum(self.tree_of[:place] == tree) for place, tree in enumerate(self.tree_of)]
        )

    def widen(self, slots: NDArray[np.int64]) -> None:
        """Give every row one new column, its own token."""
        n_new = int(slots.max()) + 1
        self.attends = np.pad(self.attends, ((0, 0), (0, n_new)))
        self.attends[np.arange(len(slots)), self.width + slots] = True
        self.width += n_new


def _prefill(
    model: LlavaForConditionalGeneration,
    trees: Sequence[PrefixTree],
    features: Sequence[Tensor | None],
    cache: DynamicCache,
) -> Tensor:
    """Run the nodes of all trees. Returns last hidden states [B, N, D]; fills the cache."""
    width = max(len(tree.input_ids) for tree in trees)
    input_ids = np.zeros((len(trees), width), dtype=np.int64)
    positions = np.zeros((len(trees), width), dtype=np.int64)
    # padding attends to itself: a softmax over nothing would be NaN
    attends = np.broadcast_to(np.eye(width, dtype=bool), (len(trees), width, width)).copy()
    for place, tree in enumerate(trees):
        n_nodes = len(tree.input_ids)
        input_ids[place, :n_nodes] = tree.input_ids
        positions[place, :n_nodes] = tree.positions
        attends[place, :n_nodes, :n_nodes] = tree.attends
    embeds = model.get_input_embeddings()(torch.from_numpy(input_ids).to(model.device))  # [B, N, D]
    for place, (tree, image) in enumerate(zip(trees, features, strict=True)):
        nodes, order = _image_nodes(tree, model.config.image_token_id)
        if len(nodes) == 0 and image is None:
            continue
        if image is None or int(order.max(initial=-1)) + 1 != len(image):
            n_features = 0 if image is None else len(image)
            raise ValueError(
                f"{int(order.max(initial=-1)) + 1} image tokens, {n_features} features"
            )
        embeds[place, torch.from_numpy(nodes)] = image[torch.from_numpy(order)].to(embeds)
    return _forward(model, embeds, positions, attends, cache)


def _image_nodes(
    tree: PrefixTree, image_token_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the image nodes and, for each, how many image tokens its row holds before it."""
    is_image = tree.input_ids == image_token_id
    nodes = np.flatnonzero(is_image)
    # the n-th image token of a row stands for the n-th feature of its image
    return nodes, tree.attends[nodes][:, is_image].sum(axis=1) - 1


def _step(model: LlavaForConditionalGeneration, state: _Rows, cache: DynamicCache) -> Tensor:
    """Run the newest token of each live row. Returns hidden states [B, slots, D]."""
    slots = state.slots()
    width = state.width
    state.widen(slots)
    n_new = state.width - width
    input_ids = np.zeros((state.n_trees, n_new), dtype=np.int64)
    positions = np.zeros((state.n_trees, n_new), dtype=np.int64)
    attends = np.zeros((state.n_trees, n_new, state.width), dtype=bool)
    # also slots without a row attend to themselves, or their softmax would be NaN
    attends[:, np.arange(n_new), width + np.arange(n_new)] = True
    input_ids[state.tree_of, slots] = [state.tokens[row][-1] for row in state.live]
    positions[state.tree_of, slots] = state.positions
    attends[state.tree_of, slots] = state.attends
    embeds = model.get_input_embeddings()(torch.from_numpy(input_ids).to(model.device))
    return _forward(model, embeds, positions, attends, cache)


def _forward(
    model: LlavaForConditionalGeneration,
    embeds: Tensor,
    positions: NDArray[np.int64],
    attends: NDArray[np.bool_],
    cache: DynamicCache,
) -> Tensor:
    """Run the language model. embeds [B, N, D], attends [B, N, columns] -> [B, N, D]."""
    allowed = torch.from_numpy(attends).to(embeds.device)[:, None]  # [B, 1, N, columns]
    # an additive mask, which both sdpa and eager attention take
    mask = torch.zeros(allowed.shape, dtype=embeds.dtype, device=embeds.device)
    mask.masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    return model.model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=torch.from_numpy(positions).to(embeds.device),
        cache=cache,
        use_cache=True,
    ).last_hidden_state


def _logits(model: LlavaForConditionalGeneration, hidden: Tensor) -> Tensor:
    """Return logits of chosen states only: [R, D] -> [R, V]."""
    return model.get_output_embeddings()(hidden)
