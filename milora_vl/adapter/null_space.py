"""Factors from the directions in which a calibration batch's inputs have the least energy.

The idea of LoRA-Null (arXiv:2503.02659): what the adapter takes out of a weight and changes is the
part of it that the inputs hardly reach, so that early training steps disturb little of what the
model computes on such inputs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from milora_vl.adapter.quantize import evaluating

MOMENT_BYTES = 4 * 1024**3


def null_space_triplets(
    weight: Tensor, moment: Tensor, r: int
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Decompose the part of a weight that acts on the r quietest input directions.

    With N [d_in, r] the eigenvectors of the smallest eigenvalues of the inputs' second moment, the
    part is ``W N N^T``; its rank is at most r.

    Args:
        weight: [d_out, d_in], float32.
        moment: [d_in, d_in], float32: sum of x x^T over calibration inputs x.
        r: Number of directions, at most min(d_out, d_in).

    Returns:
        U [d_out, r], S [r] descending and Vh [r, d_in] with ``U diag(S) Vh = W N N^T``; and the
        share of the inputs' energy inside the directions, trace(N^T M N) / trace(M), 0 to 1.
    """
    values, vectors = torch.linalg.eigh(moment.double())  # ascending; squares span a wide range
    quiet = vectors[:, :r].to(torch.float32)  # [d_in, r]
    U, S, right = torch.linalg.svd(weight @ quiet, full_matrices=False)  # [d_out, r], [r], [r, r]
    Vh = right @ quiet.T
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    signs = torch.where(largest < 0, -1.0, 1.0)  # equal inputs give equal factors
    total = float(values.sum())
    energy = float(values[:r].clamp(min=0).sum()) / total if total > 0 else 0.0
    return (U * signs, S, Vh * signs[:, None]), energy


def input_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the second moment of every layer's inputs, in the order of ``layers``.

    A moment takes 4 d_in^2 bytes, so the layers are measured in groups of ``MOMENT_BYTES``; each
    group runs the batches once.

    Args:
        model: Runs the batches, in eval mode and without gradients.
        layers: Full name -> linear layer inside ``model``.
        batches: Model inputs on the right device; padded positions are left out.
        progress: Show a progress bar.

    Yields:
        Name and moment [d_in, d_in] in float32, on the device of the layer.

    Raises:
        ValueError: If there are no batches, or inputs are not finite.
    """
    batches = list(batches)
    if not batches:
        raise ValueError(
            "init 'null_space' measures the inputs of every layer: pass calibration batches, "
            "attach_milora(..., calibration=[batch, ...])"
        )
    for group in _groups(layers):
        moments: dict[str, Tensor] = {}
        chosen = {name: layers[name] for name in group}
        bar = tqdm(batches, desc=f"inputs of {len(group)} layers", disable=not progress)
        with evaluating(model), torch.no_grad():
            for batch in bar:
                with _recording(chosen, moments, batch.get("attention_mask")):
                    model(**batch)
        for name in group:
            if name not in moments:
                raise ValueError(f"{name}: no calibration batch reaches it")
            moment = moments.pop(name)
            if not torch.isfinite(moment).all():
                raise ValueError(f"{name}: its inputs on the calibration batches are not finite")
            yield name, moment


@contextmanager
def _recording(
    layers: Mapping[str, nn.Module], moments: dict[str, Tensor], mask: Tensor | None
) -> Iterator[None]:
    def record(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask.bool()]
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)  # [tokens, d_in]
        if name not in moments:
            moments[name] = x.new_zeros(x.shape[1], x.shape[1])
        moments[name].addmm_(x.T, x)

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(layers: Mapping[str, nn.Module]) -> list[Sequence[str]]:
    groups: list[list[str]] = [[]]
    used = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features**2
        if groups[-1] and used + size > MOMENT_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
