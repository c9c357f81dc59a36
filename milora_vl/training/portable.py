"""Portable adapters from somebody else's Trainer, at every checkpoint."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.adapter.checkpoint import save_adapter
from milora_vl.adapter.portable import check_whole
from milora_vl.adapter.state import activate, adapter_states, current_adapter, recall
from milora_vl.export.elsewhere import activate_anchor_, read_start, save_from_start

logger = logging.getLogger(__name__)

PORTABLE = "portable"


class SavePortableAdapter(TrainerCallback):
    """Save a portable adapter into ``checkpoint-N/portable/adapter`` at every checkpoint.

    The Trainer's own files are for resuming; the portable adapter is a plain PEFT LoRA of rank 2r
    for the original base. It also keeps the anchor active when a Trainer resumes, which activates
    one adapter alone.

    Args:
        start: Folder of ``milora-vl init`` that the model starts from; None for a model that
            ``attach_milora`` or ``load_adapter`` made.
        base: Id or path of the original base; default: where the model was loaded from.
        processor: Processor of the base; a reference to it is kept beside the adapter.

    Raises:
        ValueError: At the start of training, if the model has no such adapter, or its parameters
            are sharded over processes.
    """

    def __init__(
        self, start: Path | str | None = None, *, base: str | None = None, processor: Any = None
    ) -> None:
        """See the class."""
        self.start = None if start is None else Path(start)
        self.base, self.processor = base, processor

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Check that the model can be saved, and make its anchor active again."""
        check_whole(model)
        if self.start is not None:
            if not isinstance(model, PeftModel):
                raise ValueError(f"{type(model).__name__} carries no adapter; use load_start")
            if read_start(self.start).target == "lora":
                activate_anchor_(model)
            return
        known = list(adapter_states(model))
        name = known[0] if len(known) == 1 else current_adapter(model)
        activate(model, recall(model, name).residual, trainable=True, adapter_name=name)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Write the adapter of this step, by the main process."""
        if not state.is_world_process_zero:
            return
        # one folder deeper than PEFT's: a Trainer that resumes loads every adapter it finds there
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder = checkpoint / PORTABLE / "adapter"
        if self.start is not None:
            save_from_start(self.start, model, folder, base=self.base)
        else:
            save_adapter(model, folder, base=self.base, processor=self.processor)
        logger.info("portable adapter: %s", folder)
