"""Conversation -> ``input_ids`` and ``labels``: the only place where either is made.

Text is tokenized in runs, once. A run ends where supervision changes, at a special token and at an
image; so a label never depends on counting tokens of a second tokenization, and the prompt of a
question is a prefix of the ids trained on. Labels are unshifted; the model shifts them.

SentencePiece-like tokenizers put a space mark before text that stands alone ("Yes" -> "▁Yes"). A
run in the middle of a text must not get it, so such a run is tokenized behind an anchor character
whose ids are then removed; the result is what tokenizing the joined text gives.

``encode_side_by_side`` puts several exchanges about the same images into one sequence: the images
are computed once, and each exchange is learned as if it were the only one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from milora_vl.constants import IGNORE_INDEX, IMAGE_TEXT, IMAGE_TOKEN, VIDEO_TOKEN
from milora_vl.data.prompts import PromptStyle, Segment, get_style, render_segments
from milora_vl.data.records import Turn

_ANCHORS = ("a", "1", "\n")
_SPACE_MARKS = ("▁", "Ġ")
_MARKS = (IMAGE_TOKEN, VIDEO_TOKEN)


@dataclass(frozen=True)
class Encoded:
    """One tokenized conversation.

    Attributes:
        input_ids: Token ids, image tokens expanded.
        labels: As long as ``input_ids``: the token where it is learned, else ``IGNORE_INDEX``.
        branches: For exchanges side by side, the branch of each token: 0 for what all begin with,
            else 1, 2, ...; None for one running conversation.
    """

    input_ids: list[int]
    labels: list[int]
    branches: list[int] | None = None


@dataclass
class _Run:
    """Consecutive tokens of one kind: text still to be tokenized, or ids.

    ``in_answer`` decides where runs end, ``learned`` what becomes a label: an answer that its
    record switches off gets the same ids as one that is learned.
    """

    in_answer: bool
    learned: bool
    text: str = ""
    ids: list[int] | None = None
    is_image: bool = False


def encode(
    turns: Sequence[Turn],
    style: PromptStyle | str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_counts: Sequence[int | str],
    max_length: int | None = None,
    add_generation_prompt: bool = False,
    answer_tokens: tuple[str, ...] = (),
) -> Encoded:
    """Tokenize a conversation for training, scoring or generation.

    Args:
        turns: Alternating user and assistant turns, an optional system turn first.
        style: A prompt style or its name.
        tokenizer: Holds the image token and the style's special tokens.
        image_token_counts: For each image or video mark, in order, the number of its image tokens;
            or the text it becomes, as the model's processor writes it, special tokens
            included.
        max_length: Longest allowed result in tokens, image tokens included; None for no limit.
            Whole exchanges at the end are dropped first; when that would leave no answer or lose an
            image, the last answer is cut instead. What is kept is always a prefix of the full ids.
        add_generation_prompt: End with what the model reads before it answers (the last turn is the
            user's). Nothing is cut then: longer than ``max_length`` is an error.
        answer_tokens: Special tokens whose names in an answer stand for the token. All other
            special tokens in answers, and all in questions, are read as characters.

    Returns:
        Ids and labels of equal length. Answers of turns with ``supervised`` false have no labels.

    Raises:
        ValueError: If image marks and counts disagree, a special token of the style or the image
            token is unknown to the tokenizer, no token would be supervised, or ``max_length``
            would cut an image or every supervised token.
    """
    style = get_style(style)
    segments = render_segments(turns, style, add_generation_prompt)
    # labels are decided before tokenizing, so they never depend on counting tokens
    silent = _silent_segments(segments, turns)
    runs = _build_runs(segments, style, tokenizer, image_token_counts, silent, answer_tokens)
    input_ids: list[int] = []
    labels: list[int] = []
    if style.bos and tokenizer.bos_token_id is not None and not _brings_bos(runs, style):
        input_ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE_INDEX)
    ends: list[int] = []  # where each answer ends
    images_end = 0
    for run, ids in zip(runs, _tokenize_runs(runs, tokenizer), strict=True):
        # an answer and its end marker are two runs, and one answer
        if ends and run.learned and ends[-1] == len(input_ids):
            ends.pop()
        input_ids += ids
        labels += ids if run.learned else [IGNORE_INDEX] * len(ids)
        if run.learned:
            ends.append(len(input_ids))
        if run.is_image:
            images_end = len(input_ids)
    if not ends and not add_generation_prompt:
        raise ValueError("the conversation has no answer to learn, so no token is supervised")
    if max_length is not None and len(input_ids) > max_length:
        if add_generation_prompt:
            raise ValueError(
                f"the prompt needs {len(input_ids)} tokens, max_length is {max_length}; raise it"
            )
        cut = _truncation_point(labels, ends, images_end, max_length)
        input_ids, labels = input_ids[:cut], labels[:cut]
    return Encoded(input_ids, labels)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the image token.

    Raises:
        ValueError: If the tokenizer does not know it.
    """
    return _token_id(tokenizer, IMAGE_TOKEN, "use the processor's tokenizer or add the token")


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, advice: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
        raise ValueError(f"the tokenizer has no single token {token!r}; {advice}")
    return token_id


def _brings_bos(runs: Sequence[_Run], style: PromptStyle) -> bool:
    """Whether BOS stands behind the images of this conversation; no text may come before it."""
    images = [position for position, run in enumerate(runs) if run.is_image]
    if not (style.bos_after_image and images):
        return False
    if any(run.ids is None for run in runs[: images[-1]]):
        raise ValueError(f"prompt style {style.name!r} holds no text before an image")
    return True


def _silent_segments(segments: Sequence[Segment], turns: Sequence[Turn]) -> set[int]:
    """Return the positions of supervised segments that belong to a turn which is not learned.

    Each answer is one unbroken row of supervised segments: its lead, its text, its end marker.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if all(turn.supervised for turn in answers):
        return set()
    rows: list[list[int]] = []
    for position, segment in enumerate(segments):
        if segment.supervised:
            if position == 0 or not segments[position - 1].supervised:
                rows.append([])
            rows[-1].append(position)
    if len(rows) != len(answers):
        raise ValueError("this prompt style joins answers, so each of them must be learned")
    silent = [row for row, turn in zip(rows, answers, strict=True) if not turn.supervised]
    return {position for row in silent for position in row}


def _build_runs(
    segments: list[Segment],
    style: PromptStyle,
    tokenizer: PreTrainedTokenizerBase,
    image_token_counts: Sequence[int | str],
    silent: set[int],
    answer_tokens: tuple[str, ...],
) -> list[_Run]:
    """Split segments at special tokens and image marks, and join neighboring text."""
    marked = [part.text for part in segments if part.has_images]
    marks = sum(text.count(mark) for text in marked for mark in _MARKS)
    if marks != len(image_token_counts):
        raise ValueError(f"{marks} {IMAGE_TOKEN} marks but {len(image_token_counts)} images")
    counts = iter(image_token_counts)
    runs: list[_Run] = []
    for position, segment in enumerate(segments):
        learned = segment.supervised and position not in silent
        splitters = style.special_tokens
        if segment.literal:
            splitters = answer_tokens if segment.supervised else ()
            splitters = _MARKS if segment.has_images else splitters
        for piece in _split_keeping(segment.text, splitters):
            if piece not in splitters:
                # the images are placed: an escaped mark is ordinary text from here on
                text = piece.replace(IMAGE_TEXT, IMAGE_TOKEN)
                _add_text(runs, _Run(segment.supervised, learned, text=text))
            elif segment.has_images:
                _add_image(runs, next(counts), tokenizer)
            else:
                advice = f"prompt style {style.name!r} needs it, choose the model's own style"
                ids = [_token_id(tokenizer, piece, advice)]
                runs.append(_Run(segment.supervised, learned, ids=ids))
    return runs


def _add_text(runs: list[_Run], run: _Run) -> None:
    """Add a run of text, or join it to the one before when both are answer or both are not."""
    if runs and runs[-1].ids is None and runs[-1].in_answer == run.in_answer:
        runs[-1].text += run.text
    else:
        runs.append(run)


def _add_image(
    runs: list[_Run], count_or_text: int | str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Add the runs of one image: its tokens, or the text that a processor wrote for it."""
    if isinstance(count_or_text, int):
        ids = [image_token_id(tokenizer)] * count_or_text
        runs.append(_Run(False, False, ids=ids, is_image=True))
        return
    for index, piece in enumerate(_added_token_pattern(tokenizer).split(count_or_text)):
        if not piece:
            continue
        if index % 2 == 0:
            _add_text(runs, _Run(False, False, text=piece))
        elif runs and runs[-1].is_image:
            runs[-1].ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            ids = [tokenizer.convert_tokens_to_ids(piece)]
            runs.append(_Run(False, False, ids=ids, is_image=True))


@lru_cache(maxsize=8)
def _added_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern whose one group is a token added to the vocabulary, the longest first."""
    names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})" if names else "((?!))")


def _split_keeping(text: str, splitters: tuple[str, ...]) -> list[str]:
    """Split at every splitter and keep it: ("a</s>b", ("</s>",)) -> ["a", "</s>", "b"]."""
    pieces = [text]
    for splitter in splitters:
        divided: list[str] = []
        for piece in pieces:
            if piece in splitters:
                divided.append(piece)
                continue
            for index, part in enumerate(piece.split(splitter)):
                divided += [splitter, part] if index else [part]
        pieces = divided
    return [piece for piece in pieces if piece]


def _tokenize_runs(runs: list[_Run], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of every run, each text tokenized as it would be at its place."""
    leads, leads_after_special = _space_mark_rule(tokenizer)
    result: list[list[int]] = [run.ids or [] for run in runs]
    plain: list[int] = []
    mid_text: list[int] = []
    for index, run in enumerate(runs):
        if run.ids is None:
            after_text = index > 0 and runs[index - 1].ids is None
            after_special = index > 0 and not after_text
            # only some tokenizers treat the first text after a special token as standing alone
            bare = leads and (after_text or (after_special and not leads_after_special))
            (mid_text if bare else plain).append(index)
    for index, ids in zip(
        plain, _tokenize([runs[at].text for at in plain], tokenizer), strict=True
    ):
        result[index] = ids
    for index, ids in zip(
        mid_text, _tokenize_mid_text([runs[at].text for at in mid_text], tokenizer), strict=True
    ):
        result[index] = ids
    return result


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts standing alone; no special token is added or recognized."""
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def _tokenize_mid_text(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts without the space mark that a text standing alone gets."""
    result: list[list[int]] = [[]] * len(texts)
    left = list(range(len(texts)))
    for anchor in _ANCHORS:
        (anchor_ids, *many) = _tokenize([anchor, *(anchor + texts[at] for at in left)], tokenizer)
        joined = []
        for at, ids in zip(left, many, strict=True):
            if ids[: len(anchor_ids)] == anchor_ids and len(ids) > len(anchor_ids):
                result[at] = ids[len(anchor_ids) :]
            else:  # the anchor grew together with the text
                joined.append(at)
        left = joined
        if not left:
            return result
    raise ValueError(f"the tokenizer joins {texts[left[0]][:20]!r} with whatever stands before it")


@lru_cache(maxsize=8)
def _space_mark_rule(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether text gets a leading space mark at the start, and after a special token."""
    alone = tokenizer.convert_ids_to_tokens(_tokenize(["a"], tokenizer)[0])
    leads = alone[0].startswith(_SPACE_MARKS)
    special = tokenizer.eos_token or IMAGE_TOKEN  # any token that is never split
    behind = tokenizer.convert_ids_to_tokens(
        tokenizer(special + "a", add_special_tokens=False)["input_ids"]
    )
    return leads, len(behind) > 1 and behind[1].startswith(_SPACE_MARKS)


def _truncation_point(labels: list[int], ends: list[int], images_end: int, max_length: int) -> int:
    """Return the length to keep; see ``encode`` for the rule."""
    # a model has as many image features as the image has tokens, so images are never cut
    whole = [end for end in ends if images_end <= end <= max_length]
    if whole:
        return whole[-1]
    needed = len(labels)
    if images_end > max_length:
        raise ValueError(
            f"max_length {max_length} would cut image tokens: the last image ends at token "
            f"{images_end} of {needed}; raise max_length or use fewer images, or fewer frames of a "
            "video (data.video_frames)"
        )
    if any(label != IGNORE_INDEX for label in labels[images_end:max_length]):
        return max_length
    if ends[0] <= images_end:  # answers before the last image are kept; the cut question has none
        return images_end
    start = next(position for position, label in enumerate(labels) if label != IGNORE_INDEX)
    raise ValueError(
        f"max_length {max_length} leaves no supervised token: the first answer starts at token "
        f"{start + 1} of {needed}; raise max_length"
    )


_IMAGES_AT_START = re.compile(rf"({re.escape(IMAGE_TOKEN)}\s*)*")


def encode_side_by_side(
    turns: Sequence[Turn],
    style: PromptStyle | str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_counts: Sequence[int | str],
    max_length: int | None = None,
    answer_tokens: tuple[str, ...] = (),
) -> Encoded:
    """Tokenize a conversation so that every exchange is learned as if it were the only one.

    All exchanges begin alike, with system text and images; that beginning is there once, and the
    rest of each follows as a branch of its own. A token may see the beginning and its own branch,
    so no answer can be read off another one. The beginning and one branch together are what
    ``encode`` gives for that exchange alone.

    Args:
        turns: As for ``encode``; the images stand at the start of the first question.
        style: A prompt style or its name.
        tokenizer: Holds the image token and the style's special tokens.
        image_token_counts: For each image mark, in order, the number of its image tokens.
        max_length: Longest allowed result in tokens; whole exchanges at the end are dropped.
        answer_tokens: As for ``encode``.

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
    if len(pairs) < 2 or any(mark in rest for rest in rests for mark in _MARKS):
        return encode(
            turns, style, tokenizer, image_token_counts, max_length, answer_tokens=answer_tokens
        )
    rows = [
        encode(
            [*system, Turn("user", opening + rest), answer],
            style,
            tokenizer,
            image_token_counts,
            max_length,
            answer_tokens=answer_tokens,
        )
        for rest, (_, answer) in zip(rests, pairs, strict=True)
        if answer.supervised  # no other exchange sees it, so one that is not learned can go
    ]
    if not rows:
        raise ValueError("the conversation has no answer to learn, so no token is supervised")
    if len(rows) == 1:
        return rows[0]
    # every branch keeps at least one token, and learned tokens are never shared
    shared = min(
        min(len(row.input_ids) - 1, next(i for i, x in enumerate(row.labels) if x != IGNORE_INDEX))
        for row in rows
    )
    # tokens can merge across the border of beginning and rest, so the ids decide what is shared
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
        same = (branches[:, None] == branches) | (branches == 0)  # its own branch, or the beginning
        allowed[place, :length, :length] = same & causal[:length, :length]
        positions[place, :length] = allowed[place, :length].sum(dim=1) - 1
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return {"attention_mask": mask[:, None], "position_ids": positions}
