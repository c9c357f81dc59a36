"""The ``training`` section of a config -> ``transformers.TrainingArguments``."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from milora_vl.config import arguments_for


def build_arguments(training: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """Turn a ``training`` section into ``TrainingArguments``.

    What the section does not say: checkpoints go to ``folder``, two are kept, no logging back-end,
    an epoch is the unit of evaluation and saving.

    Raises:
        ValueError: If transformers refuses a value, or one process would spread its batches over
            several GPUs.
    """
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "report_to": "none",
        "save_total_limit": 2,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
    }
    devices = int(os.environ.get("WORLD_SIZE", "1"))  # set by every launcher
    arguments = TrainingArguments(**(defaults | arguments_for(training, devices)))
    if arguments.n_gpu > 1:  # DataParallel averages the losses of unequal parts
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one process a GPU with "
            "`accelerate launch -m milora_vl train CONFIG`, or set CUDA_VISIBLE_DEVICES=0"
        )
    return arguments
