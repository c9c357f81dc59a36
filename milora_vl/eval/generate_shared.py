"""Greedy answers of a LLaVA model to many questions: batched, pictures and prefixes computed once.

Numbers do not depend on the batch: a row attends to its own tokens only, at their own positions, so
in exact arithmetic the result is that of ``model.generate`` on one question at a time.
``Answerer.answer_one_by_one`` is that reference.

The distinct questions of one call to the model: what is known, what is left, what was learnt.

Token sequences that begin alike, laid out so that a common beginning is computed once.

The rows of a tree become one sequence of nodes: each distinct prefix is there once, and a node may
attend to its ancestors only. With causal attention that is exact: a token's state depends only on
the tokens before it in its own row.

    row 0:  a b c d            nodes      a b c d e f
    row 1:  a b e f            positions  0 1 2 3 2 3
                               f attends  a b     e f

Greedy decoding over prefix trees: one forward pass for the prompts, then one a token.

Linear layers of a float32 model on the CPU, packed for oneDNN while many rows go through them.

PyTorch multiplies float32 matrices on the CPU with MKL, which uses the widest vectors on some makes
of CPU only; oneDNN uses them on all. The sums are the same up to the order of rounding.
"""

import hashlib
import io
import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.images import build_image_transform, load_image
from milora_vl.data.prompts import PromptStyle, get_style
from milora_vl.data.records import Turn
from milora_vl.eval.items import Answer, EvaluationError, ImageSource, Request
from milora_vl.model.load import count_image_tokens

_FEWEST_CONFIRMED = 32
_SPOT_CHECK_EVERY = 8


class Journal(Protocol):
    """Keeps answers across calls, by a digest of what was asked."""

    def get(self, digest: str) -> Answer | None:
        """Return the answer of an earlier call, or None."""

    def record(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, by digest."""


@dataclass
class Job:
    """The distinct questions of one call, and the answers so far.

    An answer of one token ("A", "Yes") is taken from the forward pass of the prompt alone once the
    model has been seen to end right after such a token 32 times without exception; every eighth
    batch goes on being asked to the end, and the first exception ends the shortcut.

    Attributes:
        max_new_tokens: Limit of an answer.
        allow_errors: Samples that may fail.
        journal: Answers of earlier calls, or None.
        asked: For each distinct question the requests that ask it.
        ids: Token ids of its prompt.
        keys: Key of its picture, or None.
        choice_ids: Tokens that are whole answers to it.
        answers: By request id.
    """

    max_new_tokens: int
    allow_errors: int
    journal: Journal | None = None
    asked: list[list[Request]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    choice_ids: list[Set[int]] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    n_confirmed: int = 0
    n_refuted: int = 0
    n_batches: int = 0

    def digest(self, key: str | None, ids: Sequence[int]) -> str:
        """Return what identifies a question to this model."""
        facts = json.dumps([key, list(ids), self.max_new_tokens])
        return hashlib.sha256(facts.encode()).hexdigest()

    def add(
        self, key: str | None, ids: Sequence[int], choices: Set[int], requests: list[Request]
    ) -> None:
        """Add a question, or answer it at once if the journal knows the answer."""
        known = None if self.journal is None else self.journal.get(self.digest(key, ids))
        if known is not None:
            self.answers |= {request.id: known for request in requests}
            return
        self.asked.append(requests)
        self.ids.append(list(ids))
        self.keys.append(key)
        self.choice_ids.append(choices)

    def final_ids(self) -> dict[int, Set[int]]:
        """Return by row the tokens to take as whole answers in the next batch."""
        self.n_batches += 1
        is_spot_check = self.n_batches % _SPOT_CHECK_EVERY == 0
        if self.n_refuted or self.n_confirmed < _FEWEST_CONFIRMED or is_spot_check:
            return {}
        return {row: tokens for row, tokens in enumerate(self.choice_ids) if tokens}

    def note_endings(self, outputs: Mapping[int, Sequence[int]], stop_ids: Set[int]) -> None:
        """Count how often the model ended right after a token that is a whole answer."""
        for row, tokens in outputs.items():
            if len(tokens) > 1 and tokens[0] in self.choice_ids[row]:
                is_end = tokens[1] in stop_ids
                self.n_confirmed += is_end
                self.n_refuted += not is_end

    def store(self, answers: Mapping[int, Answer]) -> None:
        """Keep the answers of a batch, by row."""
        for row, answer in answers.items():
            self.answers |= {request.id: answer for request in self.asked[row]}
        if self.journal is not None:
            by_digest = {
                self.digest(self.keys[row], self.ids[row]): one for row, one in answers.items()
            }
            self.journal.record(by_digest)

    def fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Mark requests as failed.

        Raises:
            EvaluationError: If that is more than allowed.
        """
        self.answers |= {one.id: Answer(None, error=str(error)) for one in requests}
        failed = [(name, one.error) for name, one in self.answers.items() if one.error]
        if len(failed) > self.allow_errors:
            listed = "; ".join(f"{name}: {message}" for name, message in failed[:5])
            raise EvaluationError(
                f"{len(failed)} failed, {self.allow_errors} allowed (allow_errors): {listed}"
            ) from error


def find_choice_ids(
    choices: Sequence[str],
    style: PromptStyle,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Set[int],
) -> frozenset[int]:
    """Return the tokens that are whole answers, as they follow the end of a prompt.

    They are read off what training teaches: the token after the prompt, if the end follows it. So
    a SentencePiece "▁A" is found and not "A", and a choice of several tokens is left out.

    Args:
        choices: Texts such as "A" or "Yes".
        style: How the model is prompted.
        tokenizer: Its tokenizer.
        stop_ids: Tokens that end an answer.
    """
    asked = [Turn("user", "?")]
    prompt = encode(asked, style, tokenizer, [], add_generation_prompt=True).input_ids
    found = set()
    for choice in choices:
        turns = [*asked, Turn("assistant", choice)]
        answer = encode(turns, style, tokenizer, []).input_ids[len(prompt) :]
        if len(answer) > 1 and answer[1] in stop_ids:
            found.add(answer[0])
    return frozenset(found)


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


MIN_ROWS = 64  # fewer are bound by reading the weight, where packing costs
MIN_SIDE = 16
MEMORY_SHARE = 0.25  # of what is available, for the packed copies


class PackedLinear(nn.Module):
    """A linear layer with a packed copy of its weight.

    Args:
        layer: Float32, on the CPU; it still does what has few rows.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """Pack the weight."""
        super().__init__()
        self.layer = layer
        self.packed = layer.weight.detach().to_mkldnn()
        self.packed_bias = None if layer.bias is None else layer.bias.detach().to_mkldnn()

    @property
    def weight(self) -> Tensor:
        """The weight as it was, [d_out, d_in]."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., d_in] -> [..., d_out]."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < MIN_ROWS or x.dtype != torch.float32:
            return self.layer(x)
        product = linear(rows.contiguous().to_mkldnn(), self.packed, self.packed_bias).to_dense()
        return product.view(*x.shape[:-1], -1)


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Pack the float32 linear layers of a model on the CPU for a ``with`` block, if memory allows.

    No gradient flows through packed layers.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _can_be_packed(child)
    ]
    needed = sum(child.weight.numel() * child.weight.element_size() for _, _, child in places)
    if needed > MEMORY_SHARE * psutil.virtual_memory().available:
        places = []
    try:
        for parent, name, child in places:
            setattr(parent, name, PackedLinear(child))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and min(weight.shape) >= MIN_SIDE and torch.backends.mkldnn.is_available()


logger = logging.getLogger(__name__)

MAX_NODES = 512
"""Most nodes of a prefix tree beyond its first row; attention over a tree costs their square."""

_FEATURE_CACHE_BYTES = 1 << 30
_FAILURES = (RuntimeError, ValueError, OSError)  # out of memory is a RuntimeError


class Answerer:
    """Asks one model; keeps the features of pictures between calls.

    Args:
        vlm: Has ``model`` (LlavaForConditionalGeneration, or a PEFT model around one),
            ``processor`` and ``prompt_style`` (a style or its name).
        batch_size: Most questions in one forward pass.
        share_prefix: Compute common beginnings once; off only to compare.
        one_forward: Take an answer of one token (``Request.choices``) from the prompt's own forward
            pass once the model was seen to end after it (see ``Job``); off to compare.
        pad_to_square: Whether pictures are padded with the mean colour, as LLaVA does.
    """

    def __init__(
        self,
        vlm: Any,
        *,
        batch_size: int = 16,
        share_prefix: bool = True,
        one_forward: bool = True,
        pad_to_square: bool = True,
    ) -> None:
        """See the class."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.vlm = vlm
        self.model = vlm.model.get_base_model() if isinstance(vlm.model, PeftModel) else vlm.model
        self.tokenizer = vlm.processor.tokenizer
        self.style = get_style(vlm.prompt_style)
        self.batch_size = batch_size
        self.share_prefix = share_prefix
        self.one_forward = one_forward
        self.transform = build_image_transform(vlm.processor.image_processor, pad_to_square)
        self.stop_ids = self._find_stop_ids()
        self.n_image_tokens = count_image_tokens(vlm.processor)
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._choice_ids = lru_cache(
            lambda choices: find_choice_ids(choices, self.style, self.tokenizer, self.stop_ids)
        )

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        allow_errors: int = 0,
        label: str = "",
        progress: bool = True,
        journal: Journal | None = None,
    ) -> dict[str, Answer]:
        """Answer all requests; requests with the same picture and prompt are asked once.

        Args:
            requests: Questions with distinct ids.
            max_new_tokens: Limit of an answer, in tokens.
            allow_errors: Samples that may fail (unreadable picture, out of memory on its own).
            label: Of the progress bar.
            progress: Whether to show one (stderr).
            journal: Answers of an earlier, interrupted call; new ones are recorded as they come.

        Returns:
            Answers by request id, for every request.

        Raises:
            EvaluationError: As soon as more than ``allow_errors`` samples have failed.
        """
        job = Job(max_new_tokens, allow_errors, journal)
        self._prepare(requests, job)
        trees = plan_trees(
            job.ids,
            job.keys,
            max_rows=self.batch_size,
            max_nodes=MAX_NODES,
            share=self.share_prefix,
        )
        # Lines of a log file need no redrawing every half second.
        interval_s = 0.5 if sys.stderr.isatty() else 15.0
        bar = tqdm(
            total=len(requests),
            desc=label,
            unit="item",
            disable=not progress,
            mininterval=interval_s,
        )
        bar.update(len(job.answers))
        with self._ready(), packed_linears(self.model), bar:
            for batch in self._batches(trees, job):
                self._run(batch, job)
                bar.update(len(job.answers) - bar.n)
        return job.answers

    def answer_one_by_one(
        self, requests: Sequence[Request], *, max_new_tokens: int
    ) -> dict[str, Answer]:
        """Answer with plain ``model.generate``, one request at a time: slow, for comparison."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=min(self.stop_ids),
        )
        answers = {}
        with self._ready():
            for request in requests:
                ids = torch.tensor([self.encode(request)], device=self.model.device)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                if request.image is not None:
                    pixels = self._read_pixels(request.image)[None]
                    inputs["pixel_values"] = pixels.to(self.model.device, self.model.dtype)
                output = self.vlm.model.generate(**inputs, generation_config=config)
                answers[request.id] = self._finish(output[0, ids.shape[1] :].tolist())
        return answers

    def encode(self, request: Request) -> list[int]:
        """Return the prompt's token ids, made exactly as for training."""
        text = request.prompt.replace(IMAGE_TOKEN, "").strip()
        counts = []
        if request.image is not None:
            text = f"{IMAGE_TOKEN}\n{text}"
            counts = [self.n_image_tokens]
        turns = [Turn("user", text)]
        return encode(
            turns, self.style, self.tokenizer, counts, add_generation_prompt=True
        ).input_ids

    def _find_stop_ids(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        stops = set(configured if isinstance(configured, list) else [configured])
        markers = [
            name for name in self.style.special_tokens if name in self.style.assistant_suffix
        ]
        stops |= {self.tokenizer.convert_tokens_to_ids(name) for name in markers}
        return (stops | {self.tokenizer.eos_token_id}) - {None}

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Evaluation mode without gradients; the training mode comes back afterwards."""
        was_training = self.vlm.model.training
        self.vlm.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.vlm.model.train(was_training)

    def _prepare(self, requests: Sequence[Request], job: Job) -> None:
        keys: dict[Any, str] = {}
        unique: dict[tuple[str | None, tuple[int, ...]], list[Request]] = {}
        for request in requests:
            key = None
            if (image := request.image) is not None:
                # rows that share a file or a text share its hash
                same = image.path or image.encoded or image
                try:
                    key = keys[same] if same in keys else keys.setdefault(same, image.key())
                except (ValueError, OSError) as error:
                    job.fail([request], error)
                    continue
            unique.setdefault((key, tuple(self.encode(request))), []).append(request)
        for (key, ids), asking in unique.items():
            choices = self._choice_ids(asking[0].choices) if self.one_forward else frozenset()
            job.add(key, ids, choices, asking)

    def _batches(self, trees: list[list[int]], job: Job) -> Iterator[list[list[int]]]:
        """Group trees of similar size; the largest first, so that lack of memory shows at once."""
        sizes = [sum(len(job.ids[row]) for row in tree) for tree in trees]
        batch: list[list[int]] = []
        for place in sorted(range(len(trees)), key=lambda place: -sizes[place]):
            if batch and sum(map(len, batch)) + len(trees[place]) > self.batch_size:
                yield batch
                batch = []
            batch.append(trees[place])
        if batch:
            yield batch

    def _run(self, batch: list[list[int]], job: Job) -> None:
        """Answer a batch; if it fails, its halves, down to the question that is to blame."""
        started = time.perf_counter()
        final_ids = job.final_ids()
        try:
            outputs = self._generate(batch, job, final_ids)
        except _FAILURES as error:
            if len(batch) == 1 and len(batch[0]) == 1:
                job.fail(job.asked[batch[0][0]], error)
                return
            if isinstance(error, torch.OutOfMemoryError):
                self.batch_size = max(1, sum(map(len, batch)) // 2)  # for the batches to come too
            logger.debug("a batch failed, trying its halves: %s", error)
        else:
            job.note_endings(outputs, self.stop_ids)
            share_s = (time.perf_counter() - started) / len(outputs)
            job.store(
                {
                    row: self._finish(tokens, final_ids.get(row, frozenset()), share_s)
                    for row, tokens in outputs.items()
                }
            )
            return
        if len(batch) == 1:
            middle = len(batch[0]) // 2
            halves = [[batch[0][:middle]], [batch[0][middle:]]]
        else:
            halves = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        for half in halves:
            self._run(half, job)

    def _generate(
        self, batch: list[list[int]], job: Job, final_ids: dict[int, Set[int]]
    ) -> dict[int, list[int]]:
        trees = [build_tree(job.ids, rows) for rows in batch]
        sources = {job.keys[rows[0]]: job.asked[rows[0]][0].image for rows in batch}
        features = self._encode_images(sources)
        return generate_over_trees(
            self.model,
            trees,
            [features[job.keys[rows[0]]] for rows in batch],
            max_new_tokens=job.max_new_tokens,
            stop_ids=self.stop_ids,
            final_ids=final_ids,
        )

    def _encode_images(
        self, sources: dict[str | None, ImageSource | None]
    ) -> dict[str | None, Tensor | None]:
        """Return features [P, D] by key; None for the key None."""
        new = {
            key: self._read_pixels(source)
            for key, source in sources.items()
            if key is not None and source is not None and key not in self._features
        }
        if new:
            self._features |= encode_pictures(self.model, new)
        result: dict[str | None, Tensor | None] = {None: None}
        for key in sources:
            if key is not None:
                self._features.move_to_end(key)
                result[key] = self._features[key]
        while sum(one.nbytes for one in self._features.values()) > _FEATURE_CACHE_BYTES:
            self._features.popitem(last=False)
        return result

    def _read_pixels(self, source: ImageSource) -> Tensor:
        try:
            return self.transform(load_image(io.BytesIO(source.read())))
        except ValueError as error:
            raise ValueError(f"{source.where}: {source.path or 'base64 image'}: {error}") from error

    def _finish(
        self, tokens: list[int], final: Set[int] = frozenset(), seconds: float = 0.0
    ) -> Answer:
        ended: bool | None = bool(tokens) and tokens[-1] in self.stop_ids
        said = tokens[:-1] if ended else tokens
        if len(tokens) == 1 and tokens[0] in final:
            ended = None
        text = self.tokenizer.decode(said, skip_special_tokens=True).strip()
        return Answer(text, n_tokens=len(tokens), ended=ended, seconds=seconds)
