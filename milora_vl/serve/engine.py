"""Answers requests in batches: a bounded number of them, and one thread that owns the model.

A batch holds requests for one adapter, so adapters are switched between batches and never within
one. Every token is passed on as it comes. A request that is done, was cancelled or is out of time
leaves its batch; the others go on.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from milora_vl.data.collate import pad_batch
from milora_vl.errors import MiloraError
from milora_vl.eval.answering import find_stop_ids
from milora_vl.eval.generate_plain import FiniteLogits
from milora_vl.serve.models import ServedModel

logger = logging.getLogger(__name__)


class QueueFullError(MiloraError, RuntimeError):
    """As many requests as the server holds are waiting or being answered."""


@dataclass(frozen=True)
class Event:
    """What a request gets to know.

    Attributes:
        text: New text.
        finish: "stop", "length", or None while the answer goes on.
        n_tokens: Generated so far.
        status: HTTP status of a failure; 0 if there is none.
        error: Its text.
    """

    text: str = ""
    finish: str | None = None
    n_tokens: int = 0
    status: int = 0
    error: str = ""


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        served: The model it asks.
        sample: Its prompt, from ``build_chat``.
        max_tokens: Longest answer.
        deadline: ``time.monotonic()`` at which it is given up.
        emit: Takes events, in the engine's thread.
        temperature: 0 for the most likely token each time.
        top_p: Share of the probability that is drawn from.
        seed: Of the draw.
        stop: Texts that end the answer.
        cancelled: Set when nobody waits for the answer any more.
        done: Whether the last event was emitted.
        on_end: Called once, before the last event.
    """

    served: ServedModel
    sample: dict[str, Any]
    max_tokens: int
    deadline: float
    emit: Callable[[Event], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: bool = False
    on_end: Callable[[], None] = lambda: None

    def finish(self, event: Event) -> None:
        """Emit the last event; later ones are dropped."""
        if not self.done:
            self.done = True
            self.on_end()
            self.emit(event)

    def give_up_if_late(self) -> bool:
        """End the request if it was cancelled or is out of time; tell whether it has ended."""
        if not self.done and self.cancelled.is_set():
            self.finish(Event(status=499, error="cancelled"))
        elif not self.done and time.monotonic() > self.deadline:
            self.finish(Event(status=504, error="the request took longer than the server allows"))
        return self.done


class Transcript:
    """Turns tokens into text that can be sent: no half characters, nothing of a stop text.

    Spaces around the whole answer are left out, as everywhere in this package.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        """Begin an empty answer."""
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._sent = 0

    def add(self, token: int) -> tuple[str, bool]:
        """Return the text that is now certain, and whether a stop text was reached."""
        self._tokens.append(token)
        text = self._text()
        ends = [place for place in (text.find(one) for one in self._stop) if place >= 0]
        if ends:
            return self._send(text[: min(ends)].rstrip()), True
        certain = text.rstrip().rstrip("\ufffd")
        held = max((_overlap(certain, one) for one in self._stop), default=0)
        return self._send(certain[: len(certain) - held]), False

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        return self._send(self._text().rstrip())

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True).lstrip()

    def _send(self, text: str) -> str:
        new = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Engine:
    """Owns the model: takes jobs, answers them in batches.

    Args:
        batch_size: Most requests in one forward pass.
        max_requests: Most requests that wait or are answered at a time.
    """

    def __init__(self, *, batch_size: int = 8, max_requests: int = 64) -> None:
        """Start the thread."""
        self.batch_size, self.max_requests = batch_size, max_requests
        self._jobs: deque[Job] = deque()
        self._ready = threading.Condition()
        self.n_requests = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def admit(self) -> None:
        """Take one of the places for requests, before images are read and held in memory.

        Raises:
            QueueFullError: If there is none.
        """
        with self._ready:
            if self.n_requests >= self.max_requests:
                raise QueueFullError(f"{self.max_requests} requests are waiting; try again later")
            self.n_requests += 1

    def give_back(self) -> None:
        """Give back the place of a request that was not submitted."""
        with self._ready:
            self.n_requests -= 1

    def submit(self, job: Job) -> None:
        """Let an admitted job wait for its batch; its place is given back when it has ended."""
        job.on_end = self.give_back
        with self._ready:
            self._jobs.append(job)
            self._ready.notify()

    def close(self) -> None:
        """Stop after the batch at hand."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                batch = self._take()
            if batch:
                self._answer(batch)

    def _take(self) -> list[Job]:
        """Take the oldest job, and others that can be answered together with it."""
        batch: list[Job] = []
        later: deque[Job] = deque()
        for job in self._jobs:
            if job.give_up_if_late():
                continue
            fits = len(batch) < self.batch_size and (not batch or _kind(job) == _kind(batch[0]))
            (batch if fits else later).append(job)
        self._jobs = later
        return batch

    def _answer(self, batch: list[Job]) -> None:
        try:
            with batch[0].served.active():
                generate_for(batch)
            for job in batch:
                job.finish(Event(status=500, error="the model stopped without an end"))
        except torch.OutOfMemoryError as error:
            waiting = [job for job in batch if not job.done]
            if len(batch) > 1:
                # text may have been sent already, so nobody is asked twice
                self.batch_size = max(1, len(batch) // 2)
                logger.warning("out of memory with %d requests at a time", len(batch))
            for job in waiting:
                job.finish(Event(status=503, error=f"out of memory: {error}"))
        except Exception as error:  # one request must not end the server
            logger.exception("a batch failed")
            for job in batch:
                job.finish(Event(status=500, error=f"{type(error).__name__}: {error}"))


def _kind(job: Job) -> Any:
    """Return what must be equal within a batch."""
    masks = job.sample.get("token_inputs", {}).get("cross_attention_mask")
    # a draw is alone; with cross attention, so is each number of images (see generate_plain)
    own = id(job) if job.temperature > 0 else None
    return job.served.name, own, None if masks is None else masks.shape[1]


class _Watch(StoppingCriteria):
    """Passes every new token on, and ends rows that are done."""

    def __init__(self, batch: Sequence[Job]) -> None:
        tokenizer = batch[0].served.vlm.tokenizer
        self.batch, self.stop_ids = batch, find_stop_ids(batch[0].served.vlm)
        self.texts = [Transcript(tokenizer, job.stop) for job in batch]
        self.counts = [0] * len(batch)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        done = [self._take(row, token) for row, token in enumerate(tokens)]
        return torch.tensor(done, device=input_ids.device)

    def _take(self, row: int, token: int) -> bool:
        job, text = self.batch[row], self.texts[row]
        if job.give_up_if_late():
            return True
        self.counts[row] = n = self.counts[row] + 1
        if token in self.stop_ids:
            job.finish(Event(text.rest(), "stop", n))
            return True
        new, stopped = text.add(token)
        if stopped:
            job.finish(Event(new, "stop", n))
        elif n >= job.max_tokens:
            job.finish(Event(new + text.rest(), "length", n))
        elif new:
            job.emit(Event(new, n_tokens=n))
        return job.done


@torch.inference_mode()
def generate_for(batch: Sequence[Job]) -> None:
    """Generate the answers of jobs for one model; tokens go to each as they come.

    Raises:
        milora_vl.eval.items.NonFiniteError: If the model's logits are NaN or infinite.
    """
    first, watch = batch[0], _Watch(batch)
    vlm, tokenizer = first.served.vlm, first.served.vlm.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    padded = pad_batch([job.sample for job in batch], pad, "left")
    inputs = {name: value.to(vlm.model.device) for name, value in padded.items()}
    draw: dict[str, Any] = {"do_sample": False}
    if first.temperature > 0:
        draw = {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p}
        draw["top_k"] = 0
    with torch.random.fork_rng():
        if first.seed is not None:
            torch.manual_seed(first.seed)
        vlm.model.generate(
            **inputs,
            **draw,
            max_new_tokens=max(job.max_tokens for job in batch),
            eos_token_id=sorted(watch.stop_ids) or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
