"""How well a model still knows language: its loss on fixed texts, and what an adapter did to it.

Short texts of many kinds, written for this package, on which forgetting of language shows.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milora_vl.eval import statistics
from milora_vl.eval.items import NonFiniteError

VERSION = 1
"""Goes up with any change of the texts: losses on different ones cannot be compared."""

PROBE_TEXTS = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it "
    "presses less. Cooks in high villages therefore boil potatoes longer, or use a closed pot in "
    "which the steam raises the pressure again.",
    "The capital of France is Paris, the capital of Japan is Tokyo, and the capital of Egypt is "
    "Cairo. Canberra, not Sydney, is the capital of Australia.",
    "A triangle with sides of three, four and five has a right angle, since nine plus sixteen is "
    "twenty-five. Its area is half of three times four, that is six.",
    "Question: A train leaves at a quarter past nine and arrives at ten to eleven. How long does "
    "it travel? Answer: From 9:15 to 10:15 is one hour, and 35 minutes more make 10:50. It travels "
    "for 1 hour and 35 minutes.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "The old lighthouse keeper climbed the stairs for the last time. Below him the harbour lay "
    "still, and a single boat came home late, its lamp swinging in the dark. He thought of the "
    "winter when the sea had taken the pier, and smiled.",
    "To plant a tree, dig a hole twice as wide as the roots but no deeper. Set the tree in the "
    "middle, fill the hole with the earth you took out, press it down and water it well. Do not "
    "bury the trunk.",
    "Photosynthesis takes place in the green parts of plants. With the energy of light, carbon "
    "dioxide and water become sugar, and oxygen is set free.",
    "Dear Ms Keller, thank you for your letter of the third of May. The missing parts were sent "
    "this morning and should reach you within two days. We are sorry for the delay. Yours "
    "sincerely",
    "If all sparrows are birds and all birds lay eggs, then all sparrows lay eggs. From the fact "
    "that a creature lays eggs, however, it does not follow that it is a sparrow.",
    "In 1969 two people walked on the Moon for the first time while a third waited in orbit. They "
    "brought back stones that are older than almost any found on Earth.",
    "SELECT name, price FROM products WHERE price < 20 ORDER BY price DESC LIMIT 5;",
    "The heart has four chambers. Blood without oxygen enters the right side and is pumped to the "
    "lungs; blood with oxygen returns to the left side and is pumped through the body.",
    "User: Can you give me three words that rhyme with light?\n"
    "Assistant: Of course. Night, bright and kite all rhyme with light.",
    "When the price of a good rises and nothing else changes, people usually buy less of it. How "
    "much less depends on what could take its place: salt has few substitutes, one brand of tea "
    "has many.",
    "Seven times eight is fifty-six. Twelve times twelve is one hundred and forty-four. Half of "
    "ninety is forty-five, and a third of it is thirty.",
    "The recipe needs two eggs, a cup of flour, half a cup of milk and a pinch of salt. Beat the "
    "eggs first, add the milk, then stir in the flour little by little so that no lumps form.",
    "Rivers carry sand and mud to the sea. Where the current slows down near the mouth, the load "
    "sinks, and over thousands of years new land grows there, which is called a delta.",
    '{"name": "Ada", "born": 1815, "known_for": ["mathematics", "notes on the first computer"]}',
    "She would have come earlier if the bridge had not been closed. As it was, she had to drive "
    "around the lake, and by the time she arrived the guests were putting on their coats.",
)


def measure_text_loss(vlm: Any) -> dict[str, Any]:
    """Measure the loss of a model on the probe texts, each alone, without images or template.

    Args:
        vlm: Has ``model`` and ``tokenizer``; the model may carry an adapter.

    Returns:
        ``loss_nats_per_token`` over all texts, ``n_tokens``, ``version`` of the texts, and
        ``by_text``: [nats, tokens] of each, for paired comparison.

    Raises:
        NonFiniteError: If the loss on a text is NaN or infinite.
    """
    was_training = vlm.model.training
    vlm.model.eval()
    try:
        with torch.inference_mode():
            # each alone: without padding nothing depends on the batch
            by_text = [_loss_sum(vlm, text) for text in PROBE_TEXTS]
    finally:
        vlm.model.train(was_training)
    for number, (nats, _) in enumerate(by_text, start=1):
        if not math.isfinite(nats):
            raise NonFiniteError(
                f"text probe: the model's loss on text {number} is not finite, so it gets no "
                "perplexity. Its weights or its adapter hold values that are not finite, or the "
                "dtype overflows: try --dtype float32"
            )
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
    if reader := getattr(vlm, "image_reader", None):
        # as labels too: PaliGemma reads an answer from left to right, a prompt both ways
        extra = reader.token_inputs(ids, ids, {})
        inputs |= {name: torch.as_tensor(value)[None] for name, value in extra.items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs = {name: value.to(vlm.model.device) for name, value in inputs.items()}
    # float32, since a sum over a large vocabulary loses digits in 16 bits
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
