"""Losses and gradients that are not finite: found at their step, before anything is written."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from milora_vl.errors import MiloraError

logger = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 10
OVERFLOWS_IN_A_ROW = 20
"""A float16 scaler starts at 2^16 and halves: after 20 overflows the scale is not the reason."""


class NonFiniteError(MiloraError, FloatingPointError):
    """A loss, a gradient or a trained tensor holds NaN or infinity."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all values are finite; the device is asked once.

    The largest absolute value decides: unlike a sum of squares it cannot overflow.
    """
    values = [one.detach() for one in tensors if one.is_floating_point() and one.numel()]
    return not values or bool(torch.isfinite(get_total_norm(values, float("inf"))))


@dataclass
class StepWatch:
    """Checks that the losses and the gradient norm of every optimizer step are finite.

    The flags are copied while the device works on, and are read one step later, so that no step
    waits. They are read at once on a CPU, and where bad steps are skipped. A float16 loss scaler
    finds its scale by overflows; they are counted, and only a long run of them is an error.

    Attributes:
        mode: Stop at such a step, or skip and count it.
        describe: Step and micro-batch (None: all of the step) -> the records, for a message.
        late: Read the flags of a step at the next one, so that no step waits for its device.
        scaled: Whether a float16 loss scaler skips steps whose gradient overflows.
        reduce: Joins a flag over processes, which must skip the same steps; None for one process.
        skipped: Steps skipped so far.
    """

    mode: Literal["stop", "skip"]
    describe: Callable[[int, int | None], str]
    late: bool = False
    scaled: bool = False
    reduce: Callable[[Tensor], Tensor] | None = None
    skipped: int = 0
    _in_a_row: int = 0
    _losses: list[Tensor] = field(default_factory=list)
    _pending: "tuple[int, Reading] | None" = None

    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of one micro-batch."""
        self._losses.append(loss.detach())

    def see_gradient(self, step: int, norm: Tensor | float | None) -> bool:
        """Take the gradient norm of a step, after its losses; 1-based ``step``.

        Returns:
            Whether the caller has to skip the step; a loss scaler does it by itself.

        Raises:
            NonFiniteError: At a step that is not finite, at the tenth skipped step in a row, or at
                the 20th overflow in a row.
        """
        losses, self._losses = self._losses, []
        device = losses[0].device if losses else torch.device("cpu")
        norm = torch.as_tensor(0.0 if norm is None else norm, device=device).float()
        # [micro-batches + 1]; True is bad, and the last place is the gradient's
        flags = ~torch.isfinite(torch.stack([*(one.float() for one in losses), norm]))
        if self.mode == "skip" and not self.scaled:
            return self._skip_if_bad(step, flags)
        late, self._pending = self._pending, (step, Reading(flags))
        if late is not None:
            self._check(*late)
        if not self.late:
            self.flush()
        return False

    def flush(self) -> None:
        """Read the flags of the last step; call it before anything is written.

        Raises:
            NonFiniteError: See ``see_gradient``.
        """
        late, self._pending = self._pending, None
        if late is not None:
            self._check(*late)

    def _check(self, step: int, reading: "Reading") -> None:
        found = reading.values()
        if self.scaled:
            self._count_overflow(step, is_overflow=found[-1])
        elif any(found):
            raise NonFiniteError(f"{self._name(step, found)}. {ADVICE}")

    def _name(self, step: int, found: list[bool]) -> str:
        """Say which number is bad at which step, with the records of its micro-batch or step."""
        bad = [index for index, flag in enumerate(found[:-1]) if flag]
        what = "the loss is" if bad else "the gradient norm is"
        return (
            f"{what} not finite at step {step}, with {self.describe(step, bad[0] if bad else None)}"
        )

    def _skip_if_bad(self, step: int, flags: Tensor) -> bool:
        is_bad = flags.any().float()
        is_bad = bool(self.reduce(is_bad) if self.reduce else is_bad)
        if not is_bad:
            self._in_a_row = 0
            return False
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        text = self._name(step, flags.tolist())
        if self._in_a_row >= SKIPS_IN_A_ROW:
            raise NonFiniteError(
                f"{self._in_a_row} steps in a row were skipped; now {text}. {ADVICE}"
            )
        logger.warning("skipped (%d so far): %s", self.skipped, text)
        return True

    def _count_overflow(self, step: int, *, is_overflow: bool) -> None:
        """Count the steps that the scaler skips, by the same gradient norm.

        Accelerate does not report them all: a fused optimizer skips on its own.
        """
        self._in_a_row = self._in_a_row + 1 if is_overflow else 0
        self.skipped += is_overflow
        if self._in_a_row >= OVERFLOWS_IN_A_ROW:
            raise NonFiniteError(
                f"float16 overflowed in {self._in_a_row} steps in a row, up to step {step}, at "
                f"every scale of the loss; with {self.describe(step, None)}. Train with bf16, "
                "or in float32"
            )


class Reading:
    """Flags that are being copied from the device, without waiting for its other work."""

    def __init__(self, flags: Tensor) -> None:
        """Start to copy flags [n]; reading them directly would wait for all work of the device."""
        self._flags = flags.to("cpu", non_blocking=True)
        self._ready: torch.cuda.Event | None = None
        if flags.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def values(self) -> list[bool]:
        """Wait for this copy alone, and return the flags."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._flags.tolist()


ADVICE = (
    "Nothing of it was written; the same command resumes from the last checkpoint. Lower the "
    "learning rate, look at these records, or skip such steps with training.on_non_finite=skip"
)
