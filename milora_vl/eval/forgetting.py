"""How well a model still knows language: its loss on fixed texts, and what an adapter did to it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milora_vl.eval import statistics
from milora_vl.eval.probe_texts import PROBE_TEXTS, VERSION


def measure_text_loss(vlm: Any) -> dict[str, Any]:
    """Measure the loss of a model on the probe texts, each alone, without pictures or template.

    Args:
        vlm: Has ``model`` and ``tokenizer``; the model may carry an adapter.

    Returns:
        ``loss_nats_per_token`` over all texts, ``n_tokens``, ``version`` of the texts, and
        ``by_text``: [nats, tokens] of each, for paired comparison.
    """
    was_training = vlm.model.training
    vlm.model.eval()
    try:
        with torch.inference_mode():
            by_text = [_loss_sum(vlm, text) for text in PROBE_TEXTS]
    finally:
        vlm.model.train(was_training)
    nats, tokens = (sum(column) for column in zip(*by_text, strict=True))
    return {
        "loss_nats_per_token": nats / tokens,
        "n_tokens": tokens,
        "version": VERSION,
        "by_text": [list(pair) for pair in by_text],
    }


def _loss_sum(vlm: Any, text: str) -> tuple[float, int]:
    """Return the summed loss of a text in nats, and how many tokens it is of."""
    tokenizer = vlm.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = tokenizer.bos_token_id
    if start is None:  # Qwen's: texts are separated by the end token
        start = tokenizer.eos_token_id
    ids = [start, *ids]
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([ids])}
    if pictures := getattr(vlm, "pictures", None):
        # as labels too: PaliGemma reads an answer from left to right, a prompt both ways
        extra = pictures.token_inputs(ids, ids, {})
        inputs |= {name: torch.as_tensor(value)[None] for name, value in extra.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs = {name: value.to(vlm.model.device) for name, value in inputs.items()}
    logits = vlm.model(**inputs).logits[0, :-1].float()  # [T - 1, V]
    target = inputs["input_ids"][0, 1:]
    return float(torch.nn.functional.cross_entropy(logits, target, reduction="sum")), len(target)


def compare_text_loss(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compare two measurements on the same texts.

    Args:
        before: From ``measure_text_loss``, of the base model.
        after: Of the tuned one.

    Returns:
        Both losses, the ratio of the perplexities (1: nothing forgotten) and its 95 % interval by
        the paired bootstrap over texts; None if texts or tokens differ.
    """
    tables = [np.array(one["by_text"], dtype=np.float64) for one in (before, after)]
    is_same = before["version"] == after["version"] and tables[0].shape == tables[1].shape
    if not is_same or not np.array_equal(tables[0][:, 1], tables[1][:, 1]):
        return None
    low, high = statistics.difference_interval(*tables, statistics.ratio)
    losses = before["loss_nats_per_token"], after["loss_nats_per_token"]
    return {
        "text_loss_before_nats_per_token": losses[0],
        "text_loss_after_nats_per_token": losses[1],
        "text_perplexity_ratio": math.exp(losses[1] - losses[0]),
        "text_perplexity_ratio_interval_95": [math.exp(low), math.exp(high)],
    }


def forgetting_text(change: Mapping[str, Any]) -> dict[str, str]:
    """Write the numbers of ``compare_text_loss`` for people, the ratio with its interval."""
    shown = {name: f"{value:.4f}" for name, value in change.items() if not isinstance(value, list)}
    for name, (low, high) in ((k, v) for k, v in change.items() if isinstance(v, list)):
        shown[name.removesuffix("_interval_95")] += f" ({low:.4f} to {high:.4f})"
    return shown
