"""Greedy answers of a LLaVA model to many questions: batched, pictures and prefixes computed once.

Numbers do not depend on the batch: a row attends to its own tokens only, at their own positions, so
in exact arithmetic the result is that of ``model.generate`` on one question at a time.
``Answerer.answer_one_by_one`` is that reference.
"""

import io
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from milora_vl.constants import IMAGE_TOKEN
from milora_vl.data.encode import encode
from milora_vl.data.images import build_image_transform, load_image
from milora_vl.data.prompts import get_style
from milora_vl.data.records import Turn
from milora_vl.eval.generation import encode_pictures, generate_over_trees
from milora_vl.eval.items import Answer, ImageSource, Request
from milora_vl.eval.job import Job, Journal, find_choice_ids
from milora_vl.eval.packed_linear import packed_linears
from milora_vl.eval.prefix_tree import build_tree, plan_trees
from milora_vl.model.load import count_image_tokens

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
