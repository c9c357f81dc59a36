"""How long a run will take on this computer: estimated at first, corrected after each stage."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milora_vl.files import write_json_atomic

logger = logging.getLogger(__name__)

STAGES = ("data", "base", "before", "finetuning", "after")
PRODUCT_STAGES = ("base", "before", "finetuning", "after")
"""Stages dominated by matrix products: the time of one corrects the estimates of the others."""

# Share of the probed rate that a stage reaches: the faster the products, the larger the share of
# attention, norms and the optimizer. docs/decisions.md says where the numbers come from.
EFFICIENCY = {"float32": 0.62, "bfloat16": 0.18}
DATA_SECONDS = 60  # drawing the demo's images, on two cores
BASE_ANSWER_SECONDS = 0.09  # of a question, beside its products: the base rarely ends by itself
TUNED_ANSWER_SECONDS = 0.005  # a finetuned model ends after a token or two
COMPOSE_SECONDS = 40  # reading the demo's two models and joining them
LOADING_SECONDS = 8  # a stage's start: model, records, decompositions
TOKENS_PER_QUESTION = 45  # the image and a shared beginning are computed once
QUESTIONS = 400  # of a bench whose files do not exist yet, as in the demo
CAPTION_TOKENS = 40  # of a caption, its question and marks, for records that do not exist yet
TOKENS_SHARE = 0.6  # of the longest sequence, for samples that do not exist yet


@dataclass(frozen=True)
class Work:
    """Operations of a run, in floating-point operations.

    Attributes:
        training: Of the finetuning.
        alignment: Of stage 1; 0 if there is none.
        evaluation: Of one evaluation, with and without images.
        questions: How many it asks; one that is also asked without its image counts twice.
    """

    training: float
    alignment: float
    evaluation: float
    questions: int = 0

    def teraflop(self) -> dict[str, float]:
        """Return {stage: operations in 10^12}, for the stages whose time is that of products."""
        each = (self.alignment, self.evaluation, self.training, self.evaluation)
        return {name: one / 1e12 for name, one in zip(PRODUCT_STAGES, each, strict=True)}


@dataclass(frozen=True)
class ModelWeights:
    """Weights of the linear layers: of the vision tower, the projector and all others."""

    tower: int
    projector: int
    language_model: int


def training_operations(
    weights: ModelWeights, samples: float, tokens: float, images: float, patches: int
) -> float:
    """Return operations to train on samples: forward, and backward through frozen weights.

    Args:
        weights: Of the model.
        samples: How many are seen, repeated ones again.
        tokens: Of one sample, image tokens included.
        images: Of one sample.
        patches: Of one image.
    """
    each = 4 * tokens * weights.language_model
    return samples * (each + 2 * images * patches * weights.tower)


def evaluation_operations(
    weights: ModelWeights, questions: int, patches: int, *, blind: bool = False
) -> float:
    """Return operations to answer questions with their picture, forward only.

    Args:
        weights: Of the model.
        questions: How many.
        patches: Of one picture.
        blind: They are also asked without the picture, which takes about as many tokens of text
            as a picture that several questions share.
    """
    each = 2 * TOKENS_PER_QUESTION * weights.language_model * (2 if blind else 1)
    return questions * (each + 2 * patches * weights.tower / 4)


def guess_seconds(work: Work, gflops: float, done: Mapping[str, bool]) -> dict[str, float]:
    """Return the seconds of every stage, 0 for those that are done.

    Args:
        work: Operations of the stages.
        gflops: Rate that the products of a whole stage reach, in GFLOP/s.
        done: Stage -> whether it is done; a stage that is absent is not part of the run.
    """
    fixed = {"data": DATA_SECONDS, "base": COMPOSE_SECONDS}
    fixed |= {
        "before": LOADING_SECONDS + BASE_ANSWER_SECONDS * work.questions,
        "finetuning": LOADING_SECONDS,
        "after": TUNED_ANSWER_SECONDS * work.questions,
    }
    seconds = {
        name: fixed.get(name, 0.0) + tera * 1e12 / (gflops * 1e9)
        for name, tera in ({"data": 0.0} | work.teraflop()).items()
    }
    return {name: 0.0 if done[name] else seconds[name] for name in STAGES if name in done}


def describe_work(work: Work, gflops: float | None) -> str:
    """Say how many operations each stage takes, and its time at a rate if one is given."""
    tera = work.teraflop()
    parts = ", ".join(f"{name} {count:.0f}" for name, count in tera.items())
    lines = [f"products: {sum(tera.values()):.0f} TFLOP: {parts}"]
    if gflops:
        seconds = guess_seconds(work, gflops, dict.fromkeys(STAGES, False))
        parts = ", ".join(f"{name} {_minutes(one)}" for name, one in seconds.items())
        whole = _minutes_text(sum(seconds.values()))
        lines.append(f"at {gflops:g} GFLOP/s: about {whole}: {parts}")
    return "\n".join(lines)


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage: estimated at the start of the run, and measured so far."""

    guessed_s: float
    seconds: float = 0.0
    is_done: bool = False


class Schedule:
    """The times of a run's stages, kept in the run folder so that repeated calls add up.

    Args:
        guesses: Stage -> seconds.
        file: Where the times are kept; None for nowhere.
    """

    def __init__(self, guesses: Mapping[str, float], file: Path | None) -> None:
        """See the class."""
        self.file = file
        self.times = {name: StageTime(guess, is_done=guess == 0) for name, guess in guesses.items()}
        self.remaining = dict(guesses)
        if file and file.exists():
            for name, kept in json.loads(file.read_text(encoding="utf-8")).items():
                if name in self.times:  # the first estimate is the one to compare with
                    is_done = self.times[name].is_done
                    self.times[name] = StageTime(kept["guessed_s"], kept["seconds"], is_done)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; afterwards correct the estimates of the other stages and log them."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._record(name, time.perf_counter() - started)
        left = {key: seconds for key, seconds in self.remaining.items() if seconds}
        if left:
            logger.info("%s took %s; %s", name, _minutes_text(self.times[name].seconds), self)

    def _record(self, name: str, seconds: float) -> None:
        before = self.times.get(name, StageTime(0.0))
        guess = self.remaining.pop(name, 0.0)
        self.times[name] = replace(before, seconds=before.seconds + seconds, is_done=True)
        if guess and name in PRODUCT_STAGES:
            for other in set(PRODUCT_STAGES) & set(self.remaining):
                # the same questions come again; other stages do other work
                same = {name, other} == {"before", "after"}
                self.remaining[other] *= seconds / guess if same else (seconds / guess) ** 0.5
        if self.file:
            write_json_atomic(self.file, self.to_json())

    def revise(self, guesses: Mapping[str, float]) -> None:
        """Replace the estimates of later stages when more is known about their work."""
        self.remaining |= {name: s for name, s in guesses.items() if name in self.remaining}

    def to_json(self) -> dict[str, Any]:
        """Return {stage: {"guessed_s", "seconds"}}."""
        return {
            name: {"guessed_s": round(one.guessed_s, 1), "seconds": round(one.seconds, 1)}
            for name, one in self.times.items()
        }

    def __str__(self) -> str:
        """Return what is left, such as "about 24 min left: base 4, before 3, ..."."""
        left = {name: seconds for name, seconds in self.remaining.items() if seconds}
        parts = ", ".join(f"{name} {_minutes(seconds)}" for name, seconds in left.items())
        return f"about {_minutes_text(sum(left.values()))} left on this computer: {parts}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 90 else f"{seconds / 60:.1f}"


def _minutes_text(seconds: float) -> str:
    return f"{_minutes(seconds)} min"
