"""Weights that hold several projections by rows: which rows belong to which projection.

Many models compute q, k and v, or gate and up, with one linear layer. Its minor singular directions
are those of the stack, in which a small projection may have no part. With ``adapter.fused: blocks``
each projection (a block of rows) is decomposed by itself at rank r. The factors of the layer are
then stacked, here for three blocks::

                       | A_q |  r                    | B_q           |
    lora_A [3r, d_in] = | A_k |  r   lora_B [d_out, 3r] = |     B_k       |
                       | A_v |  r                    |           B_v |

The layer is an ordinary LoRA layer of rank 3r. Nothing holds the zeros of lora_B in place while it
trains: they are starting values like the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATE_UP_NAMES = ("gate_up_proj", "up_gate_proj", "gate_and_up_proj")
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo", "proj")
QKV_NAMES = ("qkv_proj", "qkv", "Wqkv", "query_key_value")
# q, k and v of one head side by side, then the next head; others stack all heads of q first
BY_HEAD = ("query_key_value", "MiniMaxLightningAttention")
UNKNOWN_ORDER = ("CodeGenAttention", "FalconAttention")  # own orders of heads and projections


@dataclass(frozen=True)
class Rows:
    """How the rows of a fused weight are shared out.

    Row order: ``groups`` times (``sizes[0]`` rows of the first projection, ``sizes[1]`` rows of the
    second, ...).

    Attributes:
        groups: 1 if the projections are stacked whole; the number of heads if they alternate.
        sizes: Rows of each projection in one group.
    """

    groups: int
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of projections."""
        return len(self.sizes)

    @property
    def d_out(self) -> int:
        """Rows of the whole weight."""
        return self.groups * sum(self.sizes)

    def indices(self) -> list[Tensor]:
        """Return the rows of each projection, ascending."""
        rows = torch.arange(self.d_out, device="cpu").view(self.groups, -1)
        return [part.reshape(-1) for part in rows.split(list(self.sizes), dim=1)]

    def split(self, weight: Tensor) -> list[Tensor]:
        """Return the weight of each projection, [groups * size, d_in]."""
        by_group = weight.view(self.groups, -1, weight.shape[1])
        return [part.flatten(0, 1) for part in by_group.split(list(self.sizes), dim=1)]

    def place(self, blocks: Sequence[Tensor]) -> Tensor:
        """Return [d_out, sum of r_i] with each block [groups * size, r_i] in its own rows."""
        widths = [block.shape[1] for block in blocks]
        placed = blocks[0].new_zeros(self.d_out, sum(widths))
        starts = [sum(widths[:index]) for index in range(len(widths))]
        for rows, block, start in zip(self.indices(), blocks, starts, strict=True):
            placed[rows.to(block.device), start : start + block.shape[1]] = block
        return placed


def rows_of(model: nn.Module, name: str, layer: nn.Linear) -> Rows | None:
    """Tell how the rows of a layer are shared out, or None if it holds one projection.

    The shapes of the block around the layer and its own attributes decide; the model's
    configuration gives the number of heads.

    Args:
        model: The whole model; its weights may be absent.
        name: Full name of the layer.
        layer: The layer.

    Raises:
        ValueError: Naming the layer, if it is fused and its rows cannot be told apart.
    """
    parent_name, _, last = name.rpartition(".")
    if not is_fused(last):
        return None
    parent, d_out = model.get_submodule(parent_name), layer.out_features
    if last in GATE_UP_NAMES:
        rows = _halves(parent, d_out, ("down_proj",))
    elif last == "in_proj_qkv":
        rows = _linear_attention(parent)
    elif last == "in_proj_qkvz":
        rows = _linear_attention_by_head(parent)
    elif last == "kv_proj":
        rows = Rows(1, (d_out // 2, d_out // 2))
    elif last in QKV_NAMES:
        rows = _query_key_value(parent, last, d_out, model.config.get_text_config())
    else:
        rows = None
    if rows is None or rows.d_out != d_out or min(rows.sizes) < 1:
        raise ValueError(
            f"{name}: it fuses several projections, and {type(parent).__name__} does not tell "
            f"which of its {d_out} rows belong to which; adapter.fused=whole decomposes it as one "
            "matrix"
        )
    return rows


def is_fused(last: str) -> bool:
    """Tell whether the last part of a layer's name stands for several projections."""
    known = (*GATE_UP_NAMES, *QKV_NAMES, "in_proj_qkv", "in_proj_qkvz", "kv_proj", "c_attn")
    return last in known or "qkv" in last.lower()


def _halves(parent: nn.Module, d_out: int, followers: Sequence[str]) -> Rows | None:
    """Two projections of equal size, whose common width the layer after them reads."""
    for name in followers:
        following = getattr(parent, name, None)
        if isinstance(following, nn.Linear) and 2 * following.in_features != d_out:
            return None
    return Rows(1, (d_out // 2, d_out // 2))


def _linear_attention(parent: nn.Module) -> Rows | None:
    """Gated DeltaNet of Qwen3.5: q, k, v stacked."""
    key, value = getattr(parent, "key_dim", 0), getattr(parent, "value_dim", 0)
    return Rows(1, (key, key, value))


def _linear_attention_by_head(parent: nn.Module) -> Rows | None:
    """Gated DeltaNet of Qwen3-Next: q, k, v and the gate z of each key head side by side."""
    heads = getattr(parent, "num_k_heads", 0)
    if not heads:
        return None
    key, value = parent.key_dim // heads, parent.value_dim // heads
    return Rows(heads, (key, key, value, value))


def _query_key_value(parent: nn.Module, last: str, d_out: int, config: Any) -> Rows | None:
    """Q is as wide as what the output projection reads; k and v share the rest."""
    outputs = [getattr(parent, name, None) for name in OUTPUT_NAMES]
    query = next((x.in_features for x in outputs if isinstance(x, nn.Linear)), 0)
    key = (d_out - query) // 2
    if not query or query + 2 * key != d_out or type(parent).__name__ in UNKNOWN_ORDER:
        return None
    if last not in BY_HEAD and type(parent).__name__ not in BY_HEAD:
        return Rows(1, (query, key, key))
    heads = config.num_attention_heads
    if key != query or query % heads:  # k and v shared by several heads: orders differ
        return None
    return Rows(heads, (query // heads,) * 3)
