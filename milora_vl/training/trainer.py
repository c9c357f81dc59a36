"""A thin ``transformers.Trainer``: token-normalized loss, parameter groups, order of samples."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from milora_vl.adapter.quantized import evaluating
from milora_vl.config import ConfigError
from milora_vl.constants import IGNORE_INDEX
from milora_vl.data.dataset import group_by_length
from milora_vl.training.resume import archive_problem
from milora_vl.training.watch import NonFiniteError, StepWatch, all_finite

NAMED_RECORDS = 8


class SampleOrder(Sampler[int]):
    """Order of the samples: another one each epoch, the same on every process.

    Args:
        dataset: Has ``lengths`` and ``has_image`` for the strategy "group_by_length".
        strategy: "group_by_length", "random" or "sequential".
        batch_size: Samples over all devices in one forward pass.
        seed: Of the order.
    """

    def __init__(self, dataset: Dataset, strategy: str, batch_size: int, seed: int) -> None:
        """See the class."""
        self.dataset, self.strategy = dataset, strategy
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of one epoch."""
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch, a permutation of all."""
        if self.strategy == "group_by_length":
            lengths, has_image = self.dataset.lengths, self.dataset.has_image
            return group_by_length(lengths, has_image, self.batch_size, self.seed, epoch)
        indices = list(range(len(self.dataset)))
        if self.strategy == "random":
            random.Random(f"{self.seed}/{epoch}").shuffle(indices)
        return indices


def supervised_positions(labels: Tensor) -> Tensor:
    """Return the mask of positions whose next token is supervised: bool [B, T]."""
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORE_INDEX  # the token at t is predicted at t - 1
    return keep


def with_positions(
    collate: Callable[[list[Any]], dict[str, Tensor]], samples: list[Any]
) -> dict[str, Tensor]:
    """Collate, and find on the CPU where the supervised tokens are predicted.

    A device would have to be waited for: how many there are is a question of the labels' values.

    Returns:
        The batch with ``positions``, int64 [B, P]: those of each row, filled up to the most of any
        row with the last position, which has no next token and so no loss.
    """
    batch = collate(samples)
    keep = supervised_positions(batch["labels"])
    most = max(int(keep.sum(dim=1).max()), 1)
    last = keep.shape[1] - 1
    own = torch.where(keep, torch.arange(keep.shape[1]), last)
    return batch | {"positions": own.sort(dim=1).values[:, :most].contiguous()}


def token_loss_sum(
    model: nn.Module, inputs: Mapping[str, Tensor], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the summed cross-entropy of the supervised tokens.

    Only their positions go through the output layer, which saves most of its work and memory.

    Args:
        model: Takes ``logits_to_keep`` as a boolean mask [B, T] and as positions [B, P], or ignores
            it.
        inputs: A batch of ``pad_batch`` with unshifted ``labels`` [B, T]. With ``positions`` of
            ``with_positions`` the host never waits for the device; without them nothing is filled
            up, which is quicker on a CPU.
        label_smoothing: Share of the target that is spread over all tokens, 0 to 1.

    Returns:
        Loss sum in nats (float32 scalar) and the number of supervised tokens.
    """
    labels, positions = inputs["labels"], inputs.get("positions")
    rest = {name: value for name, value in inputs.items() if name not in ("labels", "positions")}
    keep = supervised_positions(labels) if positions is None else positions
    logits = model(**rest, logits_to_keep=keep, use_cache=False).logits  # [n, V] or [B, P, V]
    if positions is None:
        if logits.dim() == 3:  # an architecture without logits_to_keep
            logits = logits[keep]
        targets = labels[:, 1:][keep[:, :-1]]
    else:
        if logits.shape[1] == labels.shape[1]:
            logits = logits.take_along_dim(positions[..., None], dim=1)
        following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        targets = following.take_along_dim(positions, dim=1).flatten()
        logits = logits.flatten(0, 1)
    loss = functional.cross_entropy(
        logits.float(),
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss, (targets != IGNORE_INDEX).sum()


class VlmTrainer(Trainer):
    """Trainer for both stages; ``args`` are ``StageArguments``.

    Args:
        save_weights: Writes the trained weights into a folder that it makes or replaces whole.
        load_weights: Reads them back from such a folder; None if no best checkpoint is asked for.
        projector_learning_rate: Peak rate of parameters whose name holds ``projector``; None for
            the same as all others.
        measure: Returns scores of the model at a step, name -> score, None for none.
        measure_every: Steps between two calls of ``measure``.
        kwargs: As for ``transformers.Trainer``.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole optimizer step below

    def __init__(
        self,
        *,
        save_weights: Callable[[Path], None],
        load_weights: Callable[[Path], None] | None = None,
        projector_learning_rate: float | None = None,
        measure: Callable[[int], Mapping[str, float]] | None = None,
        measure_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up the parent; see the class."""
        if measure and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = ()  # evaluations without a loss; the parent refuses None
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # makes the parent count the step's answer tokens
        self.save_weights, self.load_weights = save_weights, load_weights
        self.projector_learning_rate = projector_learning_rate
        self.measure, self.measure_every = measure, measure_every
        smoothing = self.args.label_smoothing_factor
        self.loss_options = {"label_smoothing": smoothing} if smoothing else {}
        self.order: SampleOrder | None = None
        self.batches_per_epoch = 0
        several = self.args.world_size > 1
        self.watch = StepWatch(
            getattr(self.args, "on_non_finite", "stop"),
            self.describe_records,
            late=self.args.device.type != "cpu",
            scaled=self.accelerator.scaler is not None,
            reduce=partial(self.accelerator.reduce, reduction="sum") if several else None,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute this micro-batch's share of the loss per answer token of the optimizer step."""
        loss_sum, n_tokens = token_loss_sum(model, inputs, **self.loss_options)
        if num_items_in_batch is None:
            num_items_in_batch = n_tokens
        # a step whose images were all unreadable has no answer token, a loss of 0 and no gradient
        loss = loss_sum / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged, tokens summed
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do one forward and backward pass; the loss of a skipped step is logged as 0."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.see_loss(loss)
        may_skip = self.watch.mode == "skip" or self.watch.scaled
        return loss.nan_to_num(0.0, 0.0, 0.0) if may_skip else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check the gradient norm, which the parent computes anyway."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.watch.see_gradient(self.state.global_step + 1, norm):
            model.zero_grad()  # to None: an optimizer skips parameters without a gradient
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with the projector in a group of its own."""
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

    def loader_options(self) -> dict[str, Any]:
        """Return what both loaders take from the arguments."""
        names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor",
                 "multiprocessing_context", "in_order")  # fmt: skip
        options = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        collate = self.data_collator
        if self.args.device.type != "cpu":
            collate = partial(with_positions, collate)
        return {"collate_fn": collate, **options}

    def get_train_dataloader(self) -> DataLoader:
        """Build the loader in the order of the sampling strategy.

        Raises:
            ConfigError: If there is no whole batch and incomplete ones are dropped.
        """
        args = self.args
        check_some_steps(len(self.train_dataset), args)
        self.order = SampleOrder(
            self.train_dataset,
            getattr(args, "train_sampling_strategy", "group_by_length"),
            args.train_batch_size * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
        )
        loader = self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_size=args.train_batch_size,
                sampler=self.order,
                drop_last=args.dataloader_drop_last,
                worker_init_fn=partial(
                    seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
                ),
                **self.loader_options(),
            )
        )
        self.batches_per_epoch = len(loader)
        return loader

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Build the loader of this process's share of the samples.

        The parent pads the shares to one length, and so counts some samples twice.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        share = range(self.args.process_index, len(dataset), self.args.world_size)
        return DataLoader(
            Subset(dataset, share),
            batch_size=self.args.eval_batch_size,
            **self.loader_options() | {"persistent_workers": False},
        )

    def describe_records(self, step: int, micro_batch: int | None) -> str:
        """Name the records of an optimizer step, or of one micro-batch of this process."""
        args = self.args
        if self.order is None:
            return "unknown records"
        size, accumulated = args.train_batch_size, args.gradient_accumulation_steps
        steps = max(1, -(-self.batches_per_epoch // accumulated))
        epoch, at = divmod(step - 1, steps)
        # processes take batches in turn
        first, last = at * accumulated * args.world_size, (at + 1) * accumulated * args.world_size
        if micro_batch is not None:
            first += micro_batch * args.world_size + args.process_index
            last = first + 1
        indices = self.order.order(epoch)[first * size : last * size]
        named = [record_name(self.train_dataset, index) for index in indices[:NAMED_RECORDS]]
        more = len(indices) - len(named)
        return f"records {', '.join(named)}{f' and {more} more' if more else ''}"

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the validation loss in nats per answer token, and the scores that are due."""
        self.watch.flush()
        self.rest_optimizer()
        metrics: dict[str, float] = {}
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is not None and len(dataset):
            metrics[f"{metric_key_prefix}_loss"] = self.validation_loss(dataset)
        step = self.state.global_step
        if self.measure and step % self.measure_every == 0:
            # what a bench draws at random must not change the training that goes on after it
            with torch.random.fork_rng(), evaluating(self.model), self.accelerator.autocast():
                scores = self.measure(step)
            metrics |= {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def validation_loss(self, dataset: Dataset) -> float:
        """Return the loss over all batches and processes; each sample counts once."""
        # not the wrapped model: the shares may differ by a batch, and its forward waits for others
        model, sums = self.model, []
        with evaluating(model):  # not model.eval(): 4-bit layers would stop passing gradients on
            for batch in self.get_eval_dataloader(dataset):
                inputs = send_to_device(batch, self.args.device)
                with torch.no_grad(), self.accelerator.autocast():
                    loss_sum, n_tokens = token_loss_sum(model, inputs)
                sums.append(torch.stack([loss_sum.float(), n_tokens.float()]))
        total = torch.zeros(2, dtype=torch.float64)
        if sums:
            total = torch.stack(sums).cpu().double().sum(dim=0)  # [2]; one copy from the device
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total.to(self.args.device), reduction="sum")
        return (total[0] / total[1]).item()

    def deliver_best(self) -> None:
        """Load the best weights, if they are asked for, when no step is left to train."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    def rest_optimizer(self) -> None:
        """Give a schedule-free optimizer's model the weights that it is to be used with."""
        rest = getattr(self.optimizer, "eval", None)
        if callable(rest):
            rest()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of skipped steps, if any."""
        self.watch.flush()
        if self.watch.skipped:
            logs["skipped_steps"] = self.watch.skipped
        super().log(logs, start_time)

    def check_finite(self, what: str) -> None:
        """Check all that is about to be written; the device is asked once.

        Raises:
            NonFiniteError: If a trained tensor or a moment of the optimizer is not finite.
        """
        self.watch.flush()
        trained = [one for one in self.model.parameters() if one.requires_grad]
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        moments = [one for state in states for one in state.values() if isinstance(one, Tensor)]
        for name, tensors in (("weights", trained), ("the optimizer's moments", moments)):
            if not all_finite(tensors):
                step = self.state.global_step
                raise NonFiniteError(
                    f"{what} at step {step} is not written: trained {name} hold NaN or infinity, "
                    f"after {self.describe_records(max(step, 1), None)}. Checkpoints before it "
                    f"are in {self.args.output_dir}; lower the learning rate"
                )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights to ``output_dir/adapter``, complete at every checkpoint."""
        self.rest_optimizer()
        self.check_finite("a checkpoint")
        if self.args.should_save:
            self.save_weights(Path(output_dir or self.args.output_dir) / "adapter")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the run restores the weights before the optimizer is built.

        The parent would load the folder's rank-2r LoRA over the two adapters it was made from.
        """

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both; if the checkpoint lost one, only bring the learning rate to its step."""
        files = ("optimizer.pt", "scheduler.pt")
        if checkpoint and any(archive_problem(Path(checkpoint) / name) for name in files):
            for _ in range(self.state.global_step):
                self.lr_scheduler.step()
            return
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Restore the loss scale, unless it was lost; a few overflows find it again."""
        if checkpoint and not archive_problem(Path(checkpoint) / "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state, unless it was lost."""
        args = self.args
        name = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
        if checkpoint and not archive_problem(Path(checkpoint) / name):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """Read the weights of the best checkpoint; the parent looks for files of whole models."""
        if self.load_weights is not None:
            self.load_weights(Path(self.state.best_model_checkpoint) / "adapter")


def check_some_steps(n_samples: int, args: Any) -> None:
    """Check that training will do a step.

    Raises:
        ConfigError: If there is no whole batch and incomplete ones are dropped.
    """
    size = args.train_batch_size * args.world_size
    if n_samples == 0 or (args.dataloader_drop_last and n_samples < size):
        raise ConfigError(
            f"{n_samples} samples are no whole batch of {size}, and training.dataloader_drop_last "
            "drops all others: there is no step to train; make the batch smaller"
        )


def record_name(dataset: Dataset, index: int) -> str:
    """Return how errors name a sample: its file and place, as far as the data set knows."""
    places = getattr(dataset, "places", None)
    if places is not None:  # a mixture
        part, index = places[index]
        dataset = dataset.datasets[part]
    conversations: Sequence[Any] | None = getattr(dataset, "conversations", None)
    if conversations is None:
        return f"sample {index}"
    return conversations[index].where or conversations[index].id
