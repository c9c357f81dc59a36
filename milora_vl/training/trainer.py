"""A thin ``transformers.Trainer``: token-normalised loss, parameter groups, grouped sampling."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.adapter.quantized import evaluating
from milora_vl.constants import IGNORE_INDEX
from milora_vl.data.dataset import group_by_length
from milora_vl.files import write_text_atomic
from milora_vl.runtime import peak_memory_gib


class GroupedSampler(Sampler[int]):
    """Sample order of ``group_by_length``, another one each epoch, the same on every process."""

    def __init__(
        self, lengths: list[int], has_image: list[bool], batch_size: int, seed: int
    ) -> None:
        """Keep what the order depends on; ``batch_size`` counts samples over all devices."""
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of one epoch."""
        order = group_by_length(
            self.lengths, self.has_image, self.batch_size, self.seed, self.epoch
        )
        return iter(order)


def supervised_positions(labels: Tensor) -> Tensor:
    """Return the mask of positions whose next token is supervised: bool [B, T]."""
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORE_INDEX  # the token at t is predicted at t - 1
    return keep


def token_loss_sum(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the summed cross-entropy of the supervised tokens.

    Only their positions go through the output layer, which saves most of its work and memory.

    Args:
        model: Takes ``logits_to_keep`` as a boolean mask [B, T], or ignores it.
        inputs: A batch of ``pad_batch`` with unshifted ``labels`` [B, T].

    Returns:
        Loss sum in nats (float32 scalar) and the number of supervised tokens.
    """
    labels = inputs["labels"]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    keep = supervised_positions(labels)
    logits = model(**rest, logits_to_keep=keep, use_cache=False).logits  # [n, V]
    if logits.dim() == 3:  # an architecture without logits_to_keep
        logits = logits[keep]
    targets = labels[:, 1:][keep[:, :-1]]
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), keep.sum()


class VlmTrainer(Trainer):
    """Trainer for both stages.

    Args:
        save_weights: Writes the trained weights into a folder that it makes or replaces whole.
        projector_learning_rate: Peak rate of parameters whose name holds ``projector``; None for
            the same as all others.
        kwargs: As for ``transformers.Trainer``.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole optimiser step below

    def __init__(
        self,
        *,
        save_weights: Callable[[Path], None],
        projector_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up the parent; see the class."""
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # makes the parent count the step's answer tokens
        self.save_weights = save_weights
        self.projector_learning_rate = projector_learning_rate

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute this micro-batch's share of the loss per answer token of the optimiser step."""
        loss_sum, n_tokens = token_loss_sum(model, inputs)
        if num_items_in_batch is None:
            num_items_in_batch = n_tokens
        # a step whose images were all unreadable has no answer token, a loss of 0 and no gradient
        loss = loss_sum / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged, tokens summed
        return (loss, {"loss": loss}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimiser with the projector in a group of its own."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decay = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = ("projector" in name, name in decay)
                groups.setdefault(key, []).append(parameter)
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        settings = []
        for (is_projector, has_decay), parameters in groups.items():
            setting = {
                "params": parameters,
                "weight_decay": self.args.weight_decay if has_decay else 0.0,
            }
            if is_projector and self.projector_learning_rate is not None:
                setting["lr"] = self.projector_learning_rate
            settings.append(setting)
        self.optimizer = cls(settings, **kwargs)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Build the loader over batches of one modality and of similar lengths."""
        per_step = self.args.train_batch_size * self.args.world_size
        sampler = GroupedSampler(
            self.train_dataset.lengths, self.train_dataset.has_image, per_step, self.args.seed
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=self.args.dataloader_drop_last,
        )
        return self.accelerator.prepare(loader)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the validation loss in nats per answer token, over all batches and processes."""
        model = self.model_wrapped
        total = torch.zeros(2, dtype=torch.float64)
        with evaluating(model):  # not model.eval(): 4-bit layers would stop passing gradients on
            for batch in self.get_eval_dataloader(eval_dataset):
                with torch.no_grad(), self.accelerator.autocast():
                    loss_sum, n_tokens = token_loss_sum(model, batch)
                total += torch.tensor([loss_sum.item(), n_tokens.item()], dtype=torch.float64)
        total = self.accelerator.reduce(total.to(self.args.device), reduction="sum")
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights to ``output_dir/adapter``, complete at every checkpoint."""
        if self.args.should_save:
            self.save_weights(Path(output_dir or self.args.output_dir) / "adapter")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the run restores the weights before the optimiser is built.

        The parent would load the folder's rank-2r LoRA over the two adapters it was made from.
        """


class MetricsWriter(TrainerCallback):
    """Append every log to ``metrics.jsonl``, one object a line, with units in the keys."""

    NAMES = {"loss": "loss_nats_per_token", "eval_loss": "validation_loss_nats_per_token"}  # noqa: RUF012

    def __init__(self, path: Path, stage: str) -> None:
        """Write to ``path``; ``stage`` goes into every line."""
        self.path, self.stage = path, stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop this stage's lines from beyond the step that training goes on from."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if self._is_kept(line, state.global_step)]
        write_text_atomic(self.path, "".join(line + "\n" for line in kept))

    def _is_kept(self, line: str, step: int) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            return False  # half a line, from an interruption
        return entry["stage"] != self.stage or entry["step"] <= step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line.

        Raises:
            FloatingPointError: If the loss or the gradient norm is not a finite number.
        """
        logs = logs or {}
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise FloatingPointError(
                    f"{name} is {logs[name]} at step {state.global_step}; lower the learning rate "
                    f"or check the data of the steps before; checkpoints are in {args.output_dir}"
                )
        if state.is_world_process_zero:
            entry = {"stage": self.stage, "step": state.global_step}
            entry |= {self.NAMES.get(name, name): value for name, value in logs.items()}
            if "train_runtime" in logs:  # the last line of a training
                entry |= peak_memory()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")


def peak_memory() -> dict[str, float]:
    """Return the largest resident memory of this process so far, and of its GPU, in GiB."""
    found = {"peak_memory_gib": peak_memory_gib()}
    if torch.cuda.is_available():
        found["peak_cuda_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found
