"""Greedy decoding over prefix trees: one forward pass for the prompts, then one a token."""

from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from milora_vl.eval.prefix_tree import PrefixTree


def generate_over_trees(
    model: LlavaForConditionalGeneration,
    trees: Sequence[PrefixTree],
    features: Sequence[Tensor | None],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    final_ids: Mapping[int, Set[int]] | None = None,
) -> dict[int, list[int]]:
    """Decode every row of some trees greedily.

    Args:
        model: In evaluation mode; its attention must take a 4-D mask ("sdpa" or "eager").
        trees: One batch.
        features: For each tree the projected picture [P, D] that its image tokens stand for.
        max_new_tokens: Limit for each row.
        stop_ids: Tokens that end a row; the one that did is kept as the last token.
        final_ids: By row, tokens that end it if they come first: an answer of one token then costs
            no forward pass beyond the prompt's.

    Returns:
        New tokens by row number.

    Raises:
        ValueError: If image tokens and features disagree in number.
    """
    cache = DynamicCache()
    hidden = _prefill(model, trees, features, cache)
    state = _Rows(trees)
    leaves = torch.from_numpy(state.columns).to(hidden.device)
    logits = _logits(model, hidden[torch.from_numpy(state.tree_of).to(hidden.device), leaves])
    for step in range(max_new_tokens):
        state.append(logits.argmax(dim=-1).tolist(), stop_ids, {} if step else final_ids or {})
        if not len(state.tree_of) or step + 1 == max_new_tokens:
            break
        kept = state.compact_trees()
        if kept is not None:
            cache.batch_select_indices(torch.from_numpy(kept).to(hidden.device))
        hidden = _step(model, state, cache)
        slots = torch.from_numpy(state.slots()).to(hidden.device)
        trees_of_rows = torch.from_numpy(state.tree_of).to(hidden.device)
        logits = _logits(model, hidden[trees_of_rows, slots])
    return state.tokens


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

    def append(
        self, new: Sequence[int], stop_ids: set[int], final_ids: Mapping[int, Set[int]]
    ) -> None:
        """Add one token a row and forget the rows that it ends."""
        going = []
        for place, (row, token) in enumerate(zip(self.live, new, strict=True)):
            self.tokens[row].append(token)
            if token not in stop_ids and token not in final_ids.get(row, ()):
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
    attends = np.broadcast_to(np.eye(width, dtype=bool), (len(trees), width, width)).copy()
    for place, tree in enumerate(trees):
        n_nodes = len(tree.input_ids)
        input_ids[place, :n_nodes] = tree.input_ids
        positions[place, :n_nodes] = tree.positions
        attends[place, :n_nodes, :n_nodes] = tree.attends
    embeds = model.get_input_embeddings()(torch.from_numpy(input_ids).to(model.device))  # [B, N, D]
    for place, (tree, picture) in enumerate(zip(trees, features, strict=True)):
        nodes, order = _image_nodes(tree, model.config.image_token_id)
        if len(nodes) == 0 and picture is None:
            continue
        if picture is None or int(order.max(initial=-1)) + 1 != len(picture):
            n_features = 0 if picture is None else len(picture)
            raise ValueError(
                f"{int(order.max(initial=-1)) + 1} image tokens, {n_features} features"
            )
        embeds[place, torch.from_numpy(nodes)] = picture[torch.from_numpy(order)].to(embeds)
    return _forward(model, embeds, positions, attends, cache)


def _image_nodes(
    tree: PrefixTree, image_token_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the image nodes and, for each, how many image tokens its row holds before it."""
    is_image = tree.input_ids == image_token_id
    nodes = np.flatnonzero(is_image)
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


def encode_pictures(
    model: LlavaForConditionalGeneration, pixel_values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the projected features [P, D] of pictures [3, H, W], by the same keys."""
    pixels = torch.stack(list(pixel_values.values())).to(model.device, model.dtype)
    features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    return dict(zip(pixel_values, features, strict=True))
