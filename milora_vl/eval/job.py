"""The distinct questions of one call to the model: what is known, what is left, what was learnt."""

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from milora_vl.data.encode import encode
from milora_vl.data.prompts import PromptStyle
from milora_vl.data.records import Turn
from milora_vl.eval.items import Answer, EvaluationError, Request

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
