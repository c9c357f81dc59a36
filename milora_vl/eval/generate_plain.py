"""Greedy answers of any model by plain batched ``model.generate``: what works for every family.

Answers of any family to a bench's questions, by plain batched generation.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.collate import pad_batch
from milora_vl.data.encode import encode
from milora_vl.data.images import build_image_transform, load_image
from milora_vl.data.records import Turn
from milora_vl.eval.generate_shared import Answerer, Journal
from milora_vl.eval.items import Answer, EvaluationError, Request


def build_prompt(
    vlm: Any, question: str, pictures: Sequence[Image.Image] = (), pad_to_square: bool = True
) -> dict[str, Any]:
    """Encode one question as for training.

    Args:
        vlm: From ``load_vlm``.
        question: Plain text; the pictures come before it.
        pictures: RGB pictures.
        pad_to_square: Whether pictures of LLaVA-1.5 are padded with the mean colour.

    Returns:
        A sample for ``generate``.

    Raises:
        ValueError: If there are pictures and the model takes none, or not so many.
    """
    if pictures and not vlm.has_vision:
        raise ValueError(f"{vlm.path} is a text model and takes no picture")
    counts: list[Any] = [vlm.tokens_per_image] * len(pictures)
    if vlm.pictures:
        counts = vlm.pictures.expand([picture.size for picture in pictures])
    turns = [Turn("user", f"{IMAGE_TOKEN}\n" * len(pictures) + question)]
    style, tokenizer = vlm.prompt_style, vlm.tokenizer
    ids = encode(turns, style, tokenizer, counts, add_generation_prompt=True).input_ids
    if vlm.pictures:
        images = vlm.pictures.read(pictures) if pictures else {}
        tokens = vlm.pictures.token_inputs(ids, None, images)
        return {"input_ids": ids, "image_inputs": images, "token_inputs": tokens}
    sample: dict[str, Any] = {"input_ids": ids}
    if pictures:
        transform = build_image_transform(vlm.processor.image_processor, pad_to_square)
        sample["pixel_values"] = torch.stack([transform(one) for one in pictures])
    return sample


@torch.inference_mode()
def generate(
    vlm: Any,
    samples: Sequence[dict[str, Any]],
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Decode greedily, all samples in one batch padded on the left.

    Mllama's samples go in one batch for each number of pictures: in transformers, a token that sees
    no picture attends to all pictures of its batch's shape, padding included, so that an answer
    would depend on its neighbours.

    Args:
        vlm: From ``load_vlm``; its model may carry an adapter.
        samples: From ``build_prompt``.
        max_new_tokens: Longest answer in tokens.
        stop_ids: Tokens that end an answer; None: those of the model's generation config.

    Returns:
        New token ids of each sample, its end token included, padding removed.
    """
    if stop_ids is None:
        stops = vlm.model.generation_config.eos_token_id
        stop_ids = [stops] if isinstance(stops, int) else list(stops or [])
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        masks = sample.get("token_inputs", {}).get("cross_attention_mask")
        groups.setdefault(0 if masks is None else masks.shape[1], []).append(index)
    answers: dict[int, list[int]] = {}
    for group in groups.values():
        batch = [samples[index] for index in group]
        answers |= zip(group, _generate(vlm, batch, max_new_tokens, stop_ids), strict=True)
    return [answers[index] for index in range(len(samples))]


def _generate(
    vlm: Any, samples: Sequence[dict[str, Any]], max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    tokenizer, device = vlm.tokenizer, vlm.model.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = pad_batch(samples, pad, "left")
    width = batch["input_ids"].shape[1]
    inputs = {name: value.to(device) for name, value in batch.items()}
    output = vlm.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
    )
    return [_until_stop(row, set(stop_ids)) for row in output[:, width:].tolist()]


def _until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens


logger = logging.getLogger(__name__)

_FAILURES = (RuntimeError, ValueError, OSError)  # out of memory is a RuntimeError


def build_answerer(vlm: Any, *, batch_size: int = 16) -> "Answerer | PlainAnswerer":
    """Return the fast runner where every picture is one square of a fixed number of tokens.

    That is LLaVA-1.5's way, for which prefix trees are built; other families are asked by plain
    batched ``model.generate``.

    Raises:
        EvaluationError: If the model takes no pictures.
    """
    if not getattr(vlm, "has_vision", True):
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

    def __init__(self, vlm: Any, *, batch_size: int = 16) -> None:
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
        journal: Journal | None = None,
    ) -> dict[str, Answer]:
        """Answer all requests, the same question once; see ``Answerer.answer``.

        Raises:
            EvaluationError: As soon as more than ``allow_errors`` samples have failed.
        """
        answers: dict[str, Answer] = {}
        asked: dict[str, list[Request]] = {}
        for request in requests:
            try:
                asked.setdefault(_digest(request, max_new_tokens), []).append(request)
            except _FAILURES as error:
                answers[request.id] = Answer(None, error=str(error))
        for digest in list(asked):
            known = None if journal is None else journal.get(digest)
            if known is not None:
                answers |= {request.id: known for request in asked.pop(digest)}
        _check_failures(answers, allow_errors)
        # similar lengths together; the longest first, so that lack of memory shows at once
        waiting = sorted(asked, key=lambda digest: -len(asked[digest][0].prompt))
        was_training = self.vlm.model.training
        self.vlm.model.eval()
        try:
            with tqdm(total=len(requests), desc=label, unit="item", disable=not progress) as bar:
                bar.update(len(answers))
                while waiting:
                    batch, waiting = waiting[: self.batch_size], waiting[self.batch_size :]
                    found = self._run([asked[digest][0] for digest in batch], max_new_tokens)
                    new = {digest: found[asked[digest][0].id] for digest in batch}
                    answers |= {one.id: new[digest] for digest in batch for one in asked[digest]}
                    if journal is not None:
                        journal.record(new)
                    _check_failures(answers, allow_errors)
                    bar.update(len(answers) - bar.n)
        finally:
            self.vlm.model.train(was_training)
        return answers

    def answer_one_by_one(
        self, requests: Sequence[Request], *, max_new_tokens: int
    ) -> dict[str, Answer]:
        """Answer one request at a time, for comparison."""
        answers: dict[str, Answer] = {}
        for request in requests:
            answers |= self._run([request], max_new_tokens)
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

    def _run(self, batch: list[Request], max_new_tokens: int) -> dict[str, Answer]:
        """Answer a batch; if it fails, its halves, down to the question that is to blame."""
        started = time.perf_counter()
        try:
            prompts = [self._prompt(request) for request in batch]
            outputs = generate(self.vlm, prompts, max_new_tokens, self.stop_ids)
        except _FAILURES as error:
            if len(batch) == 1:
                return {batch[0].id: Answer(None, error=str(error))}
            middle = len(batch) // 2
            if isinstance(error, torch.OutOfMemoryError):
                self.batch_size = middle  # for the batches to come too
            logger.debug("a batch failed, trying its halves: %s", error)
            first = self._run(batch[:middle], max_new_tokens)
            return first | self._run(batch[middle:], max_new_tokens)
        share_s = (time.perf_counter() - started) / len(batch)
        pairs = zip(batch, outputs, strict=True)
        return {request.id: self._finish(tokens, share_s) for request, tokens in pairs}

    def _finish(self, tokens: list[int], seconds: float) -> Answer:
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        said = tokens[:-1] if ended else tokens
        text = self.vlm.tokenizer.decode(said, skip_special_tokens=True).strip()
        return Answer(text, n_tokens=len(tokens), ended=ended, seconds=seconds)

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
