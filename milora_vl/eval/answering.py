"""Ask a model many questions: each distinct one once, in batches, answers kept as they come.

``generate_shared`` and ``generate_plain`` generate a batch. What does not depend on how is here:
which questions are the same, which are answered already (the journal of an interrupted call), and
how a batch that fails is retried.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from milora_vl.eval.bench_files import shorten
from milora_vl.eval.items import Answer, EvaluationError, NonFiniteError, Request
from milora_vl.files import write_text_atomic

logger = logging.getLogger(__name__)

_FAILURES = (RuntimeError, ValueError, OSError)  # out of memory is a RuntimeError
_VALUES_PER_WEIGHT = 64


class Journal(Protocol):
    """Keeps answers across calls, by a digest of what was asked."""

    def get(self, digest: str) -> Answer | None:
        """Return the answer of an earlier call, or None."""

    def record(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, by digest."""


@dataclass(frozen=True)
class Question:
    """What is asked once, however many requests ask it.

    Attributes:
        digest: Identifies image, prompt and length of the answer.
        key: Hash of the image or images, or None.
        requests: All that ask it.
    """

    digest: str
    key: str | None
    requests: tuple[Request, ...]


class Asker(Protocol):
    """Generates the answers to a batch of questions.

    Attributes:
        vlm: The model and its parts.
        batch_size: Most questions in a batch; halved when memory runs out.
        stop_ids: Tokens that end an answer.
        tokenizer: Decodes answers.
    """

    vlm: Any
    batch_size: int
    stop_ids: Any
    tokenizer: Any

    def batches(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Yield batches, the most demanding first, so that lack of memory shows at once."""

    def generate(self, batch: Sequence[Question], max_new_tokens: int) -> list[list[int]]:
        """Return the new tokens of each answer, its end token included."""


def ask_all(
    asker: Asker,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    allow_errors: int = 0,
    label: str = "",
    progress: bool = True,
    journal: Journal | None = None,
) -> dict[str, Answer]:
    """Answer all requests; requests with the same image and prompt are asked once.

    Args:
        asker: How answers are generated.
        requests: Questions with distinct ids.
        max_new_tokens: Limit of an answer, in tokens.
        allow_errors: Samples that may fail (unreadable image, out of memory on its own).
        label: Name of the bench, for the progress bar and for errors.
        progress: Whether to show a bar (stderr).
        journal: Answers of an earlier, interrupted call; new ones are recorded as they come.

    Returns:
        Answers by request id, for every request.

    Raises:
        EvaluationError: As soon as more than ``allow_errors`` samples have failed.
        NonFiniteError: If the model's logits are not finite; no sample of it may be scored.
    """
    questions, answers = distinct_questions(requests, max_new_tokens)
    check_failures(answers, allow_errors)
    waiting = []
    for question in questions:
        known = None if journal is None else journal.get(question.digest)
        if known is None:
            waiting.append(question)
        else:
            answers |= {request.id: known for request in question.requests}
    # Lines of a log file need no redrawing every half second.
    interval_s = 0.5 if sys.stderr.isatty() else 15.0
    total = len(requests)
    options = {"desc": label, "unit": "item", "disable": not progress, "mininterval": interval_s}
    was_training = asker.vlm.model.training
    asker.vlm.model.eval()
    try:
        with torch.inference_mode(), tqdm(total=total, **options) as bar:
            bar.update(len(answers))
            # answers are kept batch by batch: an interrupted call goes on from the last one
            for batch in asker.batches(waiting):
                found = _ask_batch(asker, batch, max_new_tokens, label)
                answers |= {one.id: found[q.digest] for q in batch for one in q.requests}
                if journal is not None:
                    journal.record(found)
                check_failures(answers, allow_errors)
                bar.update(len(answers) - bar.n)
    finally:
        asker.vlm.model.train(was_training)
    return answers


def distinct_questions(
    requests: Sequence[Request], max_new_tokens: int
) -> tuple[list[Question], dict[str, Answer]]:
    """Return what has to be asked, and a failed answer for each image that cannot be read."""
    keys: dict[Any, str] = {}
    asking: dict[str, tuple[str | None, list[Request]]] = {}
    failed = {}
    for request in requests:
        found = []
        try:
            for image in request.images:
                same = image.same_as()  # rows that share a file or a text share its hash
                found.append(keys[same] if same in keys else keys.setdefault(same, image.key()))
            if request.video is not None:
                found.append(request.video.key())
        except (ValueError, OSError) as error:
            failed[request.id] = Answer(None, error=str(error))
            continue
        key = "+".join(found) or None
        # the limit is part of the question: a longer one may be answered differently
        facts = json.dumps([key, request.prompt, max_new_tokens])
        digest = hashlib.sha256(facts.encode()).hexdigest()
        asking.setdefault(digest, (key, []))[1].append(request)
    questions = [Question(digest, key, tuple(some)) for digest, (key, some) in asking.items()]
    return questions, failed


def _ask_batch(
    asker: Asker, batch: list[Question], max_new_tokens: int, label: str
) -> dict[str, Answer]:
    """Answer a batch; if it fails, its halves, down to the question that is to blame."""
    started = time.perf_counter()
    try:
        outputs = asker.generate(batch, max_new_tokens)
    except NonFiniteError as error:
        # not a failure of this sample: such a model answers something to every question
        name = batch[error.row].requests[0].id
        raise NonFiniteError(
            f"{label or 'evaluation'}: the model's logits are NaN or infinite on question {name}, "
            "so it gets no score. Its weights or its adapter hold values that are not finite, or "
            "the dtype overflows: try --dtype float32"
        ) from error
    except _FAILURES as error:
        if len(batch) == 1:
            return {batch[0].digest: Answer(None, error=str(error))}
        # halves, since one bad question must not fail its neighbors
        middle = len(batch) // 2
        if isinstance(error, torch.OutOfMemoryError):
            asker.batch_size = middle  # for the batches to come too
        logger.debug("a batch failed, trying its halves: %s", error)
        first = _ask_batch(asker, batch[:middle], max_new_tokens, label)
        return first | _ask_batch(asker, batch[middle:], max_new_tokens, label)
    share_s = (time.perf_counter() - started) / len(batch)
    pairs = zip(batch, outputs, strict=True)
    return {q.digest: read_answer(asker, tokens, share_s) for q, tokens in pairs}


def read_answer(asker: Asker, tokens: Sequence[int], seconds: float = 0.0) -> Answer:
    """Return the answer that some new tokens are."""
    ended = bool(tokens) and tokens[-1] in asker.stop_ids
    said = tokens[:-1] if ended else tokens
    text = asker.tokenizer.decode(said, skip_special_tokens=True).strip()
    return Answer(text, n_tokens=len(tokens), ended=ended, seconds=seconds)


def check_failures(answers: Mapping[str, Answer], allowed: int) -> None:
    """Check that no more samples failed than allowed.

    Raises:
        EvaluationError: Naming the first ones.
    """
    failed = [(name, one.error) for name, one in answers.items() if one.error]
    if len(failed) > allowed:
        listed = "; ".join(f"{name}: {shorten(message, 300)}" for name, message in failed[:3])
        raise EvaluationError(f"{len(failed)} failed, {allowed} allowed (allow_errors): {listed}")


def find_stop_ids(vlm: Any) -> set[int]:
    """Return the tokens that end an answer: the model's own, and those of the prompt style."""
    configured = vlm.model.generation_config.eos_token_id
    stops = set(configured if isinstance(configured, list) else [configured])
    style, tokenizer = vlm.prompt_style, vlm.tokenizer
    markers = [name for name in style.special_tokens if name in style.assistant_suffix]
    stops |= {tokenizer.convert_tokens_to_ids(name) for name in markers}
    return (stops | {tokenizer.eos_token_id}) - {None}


class AnswerJournal:
    """One JSONL file: a line that says whose answers these are, then a line a batch of answers.

    A line is flushed to disk before the next batch is asked. One cut short by a crash is dropped.
    A file of another model, adapter or prompt style is set aside and a new one begun.

    Args:
        path: The file.
        identity: What the answers depend on besides the questions; compared as JSON.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """See the class."""
        self.path = path
        self._known: dict[str, Answer] = {}
        self._served: dict[str, float] = {}
        self._header = header = json.dumps({"identity": dict(identity)}, sort_keys=True)
        # a crash may cut a character in two; texts may hold other line breaks than "\n"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = [line for line in text.split("\n") if line]
        if lines and lines[0] == header:
            kept = [line for line in lines[1:] if self._take(line)]
            logger.info("%s: going on with %d answers of an earlier call", path, len(self._known))
        else:
            kept = []
            if lines:
                logger.warning("%s belongs to another model or adapter; starting anew", path)
        write_text_atomic(path, "".join(f"{line}\n" for line in [header, *kept]))

    def take_over(self, other: Path) -> None:
        """Record another process's answers, if they are of the same model, and delete its file."""
        text = other.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.split("\n") if line]
        if lines and lines[0] == self._header:
            whole = [line for line in lines[1:] if self._take(line)]
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in whole))
        other.unlink()

    def _take(self, line: str) -> bool:
        try:
            entries = json.loads(line)
        except json.JSONDecodeError:
            return False  # the crash hit while this line was written
        self._known |= {digest: Answer(**values) for digest, values in entries.items()}
        return True

    def get(self, digest: str) -> Answer | None:
        """Return the answer to a question, or None if it was not asked yet."""
        answer = self._known.get(digest)
        if answer is not None:
            self._served[digest] = answer.seconds
        return answer

    @property
    def served_seconds(self) -> float:
        """What the answers given out so far had cost when they were asked, in seconds."""
        return sum(self._served.values())

    def record(self, answers: Mapping[str, Answer]) -> None:
        """Append the answers of a batch; on return they are on disk."""
        entries = {
            digest: {
                "text": answer.text,
                "n_tokens": answer.n_tokens,
                "ended": answer.ended,
                "seconds": round(answer.seconds, 6),
            }
            for digest, answer in answers.items()
            if answer.error is None
        }
        self._known |= {digest: answers[digest] for digest in entries}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entries, ensure_ascii=False) + "\n")
            stream.flush()
            # on disk before the next batch: also a power cut loses no more than one
            os.fsync(stream.fileno())

    def remove(self) -> None:
        """Delete the file: the evaluation is whole and its results hold every answer."""
        self.path.unlink(missing_ok=True)


def fingerprint_weights(model: torch.nn.Module) -> str:
    """Return a digest of a few values of every weight, adapters included, in well under a second.

    Training changes some of them; a copy of the same checkpoint has the same ones.
    """
    digest = hashlib.sha256()
    # a few values of every weight: training changes some of them, and reading all takes long
    for name, weight in sorted(model.named_parameters()):
        values = weight.detach().flatten()
        step = max(1, len(values) // _VALUES_PER_WEIGHT)
        sample = values[::step][:_VALUES_PER_WEIGHT].float().cpu().numpy()
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(sample, dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]
