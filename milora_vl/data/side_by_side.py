"""Exchanges about one picture side by side: each is learnt alone, the picture is computed once."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from milora_vl.constants import IGNORE_INDEX, IMAGE_TOKEN
from milora_vl.data.encode import Encoded, encode
from milora_vl.data.prompts import PromptStyle
from milora_vl.data.records import Turn

_IMAGES_AT_START = re.compile(rf"({re.escape(IMAGE_TOKEN)}\s*)*")


def encode_side_by_side(
    turns: Sequence[Turn],
    style: PromptStyle | str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_counts: Sequence[int],
    max_length: int | None = None,
) -> Encoded:
    """Tokenise a conversation so that every exchange is learnt as if it were the only one.

    All exchanges begin alike, with system text and images; that beginning is there once, and the
    rest of each follows as a branch of its own. A token may see the beginning and its own branch,
    so no answer can be read off another one. Each branch, put behind the beginning, is what
    ``encode`` gives for its exchange alone.

    Args:
        turns: As for ``encode``; the images stand at the start of the first question.
        style: A prompt style or its name.
        tokenizer: Holds the image token and the style's special tokens.
        image_token_counts: For each image mark, in order, the number of its image tokens.
        max_length: Longest allowed result in tokens; whole exchanges at the end are dropped.

    Returns:
        Ids, labels and branches of equal length. A conversation of one exchange, or with an image
        anywhere else, comes back as from ``encode``, with ``branches`` None.

    Raises:
        ValueError: As ``encode`` does.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    pairs = list(zip(turns[len(system) :: 2], turns[len(system) + 1 :: 2], strict=False))
    opening = _IMAGES_AT_START.match(pairs[0][0].text).group() if pairs else ""
    rests = [question.text for question, _ in pairs]
    if pairs:
        rests[0] = rests[0].removeprefix(opening)
    if len(pairs) < 2 or any(IMAGE_TOKEN in rest for rest in rests):
        return encode(turns, style, tokenizer, image_token_counts, max_length)
    rows = [
        encode(
            [*system, Turn("user", opening + rest), answer],
            style,
            tokenizer,
            image_token_counts,
            max_length,
        )
        for rest, (_, answer) in zip(rests, pairs, strict=True)
    ]
    # one token is left to every branch, and nothing that is learnt is shared
    shared = min(
        min(len(row.input_ids) - 1, next(i for i, x in enumerate(row.labels) if x != IGNORE_INDEX))
        for row in rows
    )
    for row in rows[1:]:
        pairs_of_ids = zip(rows[0].input_ids[:shared], row.input_ids, strict=False)
        shared = next((i for i, (one, other) in enumerate(pairs_of_ids) if one != other), shared)
    input_ids, labels = rows[0].input_ids[:shared], rows[0].labels[:shared]
    branches = [0] * shared
    for number, row in enumerate(rows, start=1):
        rest_ids, rest_labels = row.input_ids[shared:], row.labels[shared:]
        if max_length is None or len(input_ids) + len(rest_ids) <= max_length:
            input_ids, labels = input_ids + rest_ids, labels + rest_labels
            branches += [number] * len(rest_ids)
    return Encoded(input_ids, labels, branches)


def compute_branch_inputs(rows: Sequence[Tensor], width: int) -> dict[str, Tensor]:
    """Return what makes each token see its own branch and the beginning only.

    Args:
        rows: For each sample the branch of every token, int64 [length].
        width: Padded length T; padding, on the right, sees itself only.

    Returns:
        ``attention_mask`` float32 [B, 1, T, T], 0 where a token may look and the lowest float
        elsewhere; ``position_ids`` int64 [B, T], in each branch counting on from the beginning.
    """
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    for place, branches in enumerate(rows):
        length = len(branches)
        same = (branches[:, None] == branches) | (branches == 0)
        allowed[place, :length, :length] = same & causal[:length, :length]
        positions[place, :length] = allowed[place, :length].sum(dim=1) - 1
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return {"attention_mask": mask[:, None], "position_ids": positions}
