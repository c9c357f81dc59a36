"""Weight decay toward the start (A0, B0) of an adapter, where plain decay goes toward zero.

A factor that starts from pretrained weights carries part of them, which plain decay removes. Here
each optimizer step moves the factor by lr * rate toward its start first, as AdamW's decoupled decay
moves it toward zero: what shrinks is how far training has gone. The pull does not enter the
gradient, so Adam's moments do not rescale it.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from milora_vl.adapter.state import MiloraState, anchor_of, current_adapter, factors, recall
from milora_vl.config import ConfigError


class DecayToStart(TrainerCallback):
    """Let the factors of a MiLoRA adapter decay toward their start, in any ``Trainer``.

    Args:
        rate: Decay rate, dimensionless; each step takes ``learning rate * rate`` of the way back.

    Raises:
        ValueError: At the start of training, if the model has no such adapter, its method has no
            start of its own, or the optimizer does not tell when it steps.
    """

    def __init__(self, rate: float) -> None:
        """See the class."""
        self.rate = rate
        self.starts: dict[Tensor, Tensor] = {}
        self.hook: Any = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """Find the starts, and stand before every step of the optimizer."""
        stepping = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        self.starts = start_of(model)
        self.hook = pull_before_steps(stepping, self.starts, self.rate)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was."""
        if self.hook is not None:
            self.hook.remove()
        self.starts, self.hook = {}, None


def check_decay(arguments: TrainingArguments) -> None:
    """Refuse, before anything is decomposed, settings whose optimizer cannot be pulled.

    Raises:
        ConfigError: Naming the setting.
    """
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if arguments.deepspeed or optimizer.startswith("schedule_free"):
        name = "deepspeed" if arguments.deepspeed else f"optim: {optimizer}"
        raise ConfigError(
            "adapter.decay_to_start moves the parameters before each step, and with training."
            f"{name} the optimizer steps on other values; use adamw_torch without DeepSpeed"
        )


def check_has_start(state: MiloraState) -> None:
    """Refuse a method whose factors do not start from pretrained weights.

    Raises:
        ValueError: Naming the method.
    """
    if not state.has_anchor:
        raise ValueError(
            f"decay_to_start: with init={state.init} the update starts at zero, so plain "
            "weight_decay is the same; use training.weight_decay"
        )


@torch.no_grad()
def start_of(peft_model: PeftModel) -> dict[Tensor, Tensor]:
    """Return trainable factor -> its start, on the same device, for the active adapter."""
    state, adapter_name = recall(peft_model), current_adapter(peft_model)
    check_has_start(state)
    starts: dict[Tensor, Tensor] = {}
    for name in state.modules:
        pairs = zip(
            factors(peft_model, name, adapter_name),
            factors(peft_model, name, anchor_of(adapter_name)),
            (1.0, -1.0),  # the anchor holds (A0, -B0)
            strict=True,
        )
        starts |= {live: sign * frozen.detach().to(live.device) for live, frozen, sign in pairs}
    return starts


def pull_before_steps(
    optimizer: torch.optim.Optimizer, starts: dict[Tensor, Tensor], rate: float
) -> Any:
    """Make an optimizer pull parameters toward their starts before each of its steps.

    Args:
        optimizer: Of torch; a step that a loss scaler leaves out pulls nothing either.
        starts: Parameter -> where it is pulled to.
        rate: Each step takes ``lr * rate`` of the way, with the lr of the parameter's group.

    Returns:
        A handle with ``remove()``.

    Raises:
        ValueError: If the optimizer keeps other values than those of its parameters.
    """
    # ZeRO steps on its own copies, schedule-free ones on points between two sequences
    is_plain = isinstance(optimizer, torch.optim.Optimizer)
    if not is_plain or callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"decay_to_start moves the parameters before each step, and {type(optimizer).__name__} "
            "steps on other values; use adamw_torch without DeepSpeed"
        )

    @torch.no_grad()
    def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # a fused optimizer learns here, and from within, that a float16 scaler leaves the step out
        skipped = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            share = float(group["lr"]) * rate
            for parameter in group["params"]:
                start = starts.get(parameter)
                if start is not None and parameter.grad is not None:
                    way = share if skipped is None else share * (1 - skipped.to(parameter))
                    parameter.lerp_(start.to(parameter.dtype), way)

    return optimizer.register_step_pre_hook(pull)
