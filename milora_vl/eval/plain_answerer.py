"""Answers of any family to a bench's questions, by plain batched generation."""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.images import load_image
from milora_vl.eval.items import Answer, EvaluationError, Request
from milora_vl.eval.plain_generation import build_prompt, generate
from milora_vl.eval.runner import Answerer

logger = logging.getLogger(__name__)

_FAILURES = (RuntimeError, ValueError, OSError)  # out of memory is a RuntimeError


def build_answerer(vlm: Any, *, batch_size: int = 32) -> "Answerer | PlainAnswerer":
    """Return the fast runner where every picture is one square of a fixed number of tokens.

    That is LLaVA-1.5's way, for which prefix trees are built; other families are asked by plain
    batched ``model.generate``.

    Raises:
        EvaluationError: If the model takes no pictures.
    """
    if not getattr(vlm, "sees", True):
        raise EvaluationError(f"{vlm.path} is a text model; the benches ask about pictures")
    if getattr(vlm, "pictures", None) is None:
        return Answerer(vlm, batch_size=batch_size)
    return PlainAnswerer(vlm, batch_size=batch_size)


class PlainAnswerer:
    """Asks one model with ``model.generate``; the interface is that of ``Answerer``.

    Args:
        vlm: From ``load_vlm``; its model may carry an adapter.
        batch_size: Most questions in one forward pass.
    """

    def __init__(self, vlm: Any, *, batch_size: int = 32) -> None:
        """See the class."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.vlm = vlm
        self.style = vlm.prompt_style
        self.batch_size = batch_size
        self.stop_ids = self._find_stop_ids()

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        allow_errors: int = 0,
        label: str = "",
        progress: bool = True,
        journal: Any = None,
    ) -> dict[str, Answer]:
        """Answer all requests; see ``Answerer.answer``.

        Raises:
            EvaluationError: As soon as more than ``allow_errors`` samples have failed.
        """
        answers: dict[str, Answer] = {}
        was_training = self.vlm.model.training
        self.vlm.model.eval()
        try:
            with tqdm(total=len(requests), desc=label, unit="item", disable=not progress) as bar:
                for start in range(0, len(requests), self.batch_size):
                    batch = list(requests[start : start + self.batch_size])
                    known = self._look_up(batch, max_new_tokens, journal)
                    answers |= known
                    self._run(
                        [one for one in batch if one.id not in known],
                        max_new_tokens,
                        answers,
                        journal,
                    )
                    _check_failures(answers, allow_errors)
                    bar.update(len(batch))
        finally:
            self.vlm.model.train(was_training)
        return answers

    def answer_one_by_one(
        self, requests: Sequence[Request], *, max_new_tokens: int
    ) -> dict[str, Answer]:
        """Answer one request at a time, for comparison."""
        answers: dict[str, Answer] = {}
        for request in requests:
            self._run([request], max_new_tokens, answers, None)
        return answers

    def encode(self, request: Request) -> list[int]:
        """Return the prompt's token ids, made exactly as for training."""
        return self._prompt(request)["input_ids"]

    def _prompt(self, request: Request) -> dict[str, Any]:
        pictures = []
        if request.image is not None:
            try:
                pictures = [load_image(io.BytesIO(request.image.read()))]
            except ValueError as error:
                raise ValueError(f"{request.image.where}: {error}") from error
        question = request.prompt.replace(IMAGE_TOKEN, "").strip()
        return build_prompt(self.vlm, question, pictures)

    def _run(
        self,
        batch: list[Request],
        max_new_tokens: int,
        answers: dict[str, Answer],
        journal: Any,
    ) -> None:
        """Answer a batch; if it fails, its halves, down to the question that is to blame."""
        if not batch:
            return
        try:
            prompts = [self._prompt(request) for request in batch]
            outputs = generate(self.vlm, prompts, max_new_tokens, self.stop_ids)
        except _FAILURES as error:
            if len(batch) == 1:
                answers[batch[0].id] = Answer(None, error=str(error))
                return
            if isinstance(error, torch.OutOfMemoryError):
                self.batch_size = max(1, len(batch) // 2)
            logger.debug("a batch failed, trying its halves: %s", error)
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._run(half, max_new_tokens, answers, journal)
            return
        for request, tokens in zip(batch, outputs, strict=True):
            answers[request.id] = self._finish(tokens)
            if journal is not None:
                digest = _digest(request, max_new_tokens)
                journal.record({digest: answers[request.id]})

    def _look_up(
        self, batch: list[Request], max_new_tokens: int, journal: Any
    ) -> dict[str, Answer]:
        if journal is None:
            return {}
        found = {one.id: journal.get(_digest(one, max_new_tokens)) for one in batch}
        return {name: answer for name, answer in found.items() if answer is not None}

    def _finish(self, tokens: list[int]) -> Answer:
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        said = tokens[:-1] if ended else tokens
        text = self.vlm.tokenizer.decode(said, skip_special_tokens=True).strip()
        return Answer(text, n_tokens=len(tokens), ended=ended)

    def _find_stop_ids(self) -> list[int]:
        configured = self.vlm.model.generation_config.eos_token_id
        stops = set(configured if isinstance(configured, list) else [configured])
        suffix = self.style.assistant_suffix
        markers = [name for name in self.style.special_tokens if name in suffix]
        tokenizer = self.vlm.tokenizer
        stops |= {tokenizer.convert_tokens_to_ids(name) for name in markers}
        return sorted((stops | {tokenizer.eos_token_id}) - {None})


def _digest(request: Request, max_new_tokens: int) -> str:
    key = None if request.image is None else request.image.key()
    return hashlib.sha256(json.dumps([key, request.prompt, max_new_tokens]).encode()).hexdigest()


def _check_failures(answers: dict[str, Answer], allowed: int) -> None:
    failed = [(name, one.error) for name, one in answers.items() if one.error]
    if len(failed) > allowed:
        listed = "; ".join(f"{name}: {message}" for name, message in failed[:5])
        raise EvaluationError(f"{len(failed)} failed, {allowed} allowed (allow_errors): {listed}")
