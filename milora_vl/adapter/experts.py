"""Weights of all experts of a layer in one tensor, adapted one expert at a time.

A mixture-of-experts layer keeps its projections as [n_experts, rows, columns]. PEFT adapts such a
tensor by ``target_parameters``: rank r for each expert, all factors in one lora_A and one lora_B::

    delta[e] = s * left[e] @ right[e]        left [E, rows, r], right [E, r, columns]

    lora_A [E r, columns]  = right, experts below each other
    lora_B [rows, r E]     = left, the expert as the last index

(for tensors stored transposed, ``is_transposed`` of the module, rows and columns change places).
Limits of PEFT: no dropout, no DoRA, no bias; the layer computes with W[e] + delta[e], which is
formed anew in each forward pass; and all adapters on a model name the same tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from milora_vl.adapter.certificate import LayerCertificate, certify_layer


@dataclass(frozen=True)
class Stack:
    """How the experts of one tensor are kept.

    Attributes:
        count: Number of experts E.
        transposed: PEFT takes the tensor as [E, d_in, d_out].
        depth: How many adapted tensors of the same module come after this one; PEFT nests their
            wrappers, the last one outside.
    """

    count: int
    transposed: bool
    depth: int = 0

    def pack(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return lora_A and lora_B of left [E, rows, r] and right [E, r, columns]."""
        if self.transposed:
            left, right = right.mT, left.mT
        return right.flatten(0, 1).contiguous(), left.permute(1, 2, 0).flatten(1).contiguous()

    def unpack(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return left [E, rows, r] and right [E, r, columns] of PEFT's factors."""
        right = lora_A.unflatten(0, (self.count, -1))
        left = lora_B.unflatten(1, (-1, self.count)).permute(2, 0, 1)
        return (right.mT, left.mT) if self.transposed else (left, right)

    def join(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the factors of the sum of several adapters."""
        lefts, rights = zip(*(self.unpack(*pair) for pair in pairs), strict=True)
        return self.pack(torch.cat(lefts, dim=2), torch.cat(rights, dim=1))

    def part(self, lora_A: Tensor, lora_B: Tensor, index: int, r: int) -> tuple[Tensor, Tensor]:
        """Return the factors of one of the joined adapters, each of rank r an expert."""
        left, right = self.unpack(lora_A, lora_B)
        own = slice(index * r, (index + 1) * r)
        return self.pack(left[:, :, own], right[:, own])

    def add_(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Add scaling * left[e] right[e] to every expert of a float32 weight [E, rows, columns]."""
        for expert, left, right in zip(weight, *self.unpack(lora_A, lora_B), strict=True):
            expert.addmm_(left, right, alpha=scaling)
        return weight


class StackedWeight:
    """A tensor of experts under the names that a linear layer has.

    Attributes:
        in_features: d_in as PEFT counts it.
        out_features: d_out as PEFT counts it.
    """

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        """Point at a parameter of the module that keeps it."""
        self._owner, self._parameter = owner, parameter
        rows, columns = self.weight.shape[1:]
        transposed = is_transposed(owner)
        self.in_features = rows if transposed else columns
        self.out_features = columns if transposed else rows

    @property
    def weight(self) -> Tensor:
        """The tensor itself, [E, rows, columns]."""
        return getattr(self._owner, self._parameter)


def is_transposed(owner: nn.Module) -> bool:
    """Tell whether PEFT takes the tensors of a module as [E, d_in, d_out]."""
    return bool(getattr(owner, "is_transposed", False))


def layer_of(model: nn.Module, name: str) -> Any:
    """Return what holds the weight of a target: a linear layer, or a ``StackedWeight``.

    Args:
        model: The base model; its layers may be wrapped by PEFT.
        name: Full name of a linear layer, or of a parameter that keeps experts.

    Raises:
        AttributeError: If the model has neither.
    """
    owner_name, _, last = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, BaseTunerLayer):
        owner = owner.get_base_layer()
    found = getattr(owner, last)
    if isinstance(found, nn.Parameter):
        return StackedWeight(owner, last)
    return found.get_base_layer() if isinstance(found, BaseTunerLayer) else found


def wrapper_of(model: nn.Module, name: str) -> LoraLayer:
    """Return the PEFT layer of a target; ``model`` is the base inside the PEFT model."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        owner_name, _, parameter = name.rpartition(".")
        wrapper = model.get_submodule(owner_name)
        while getattr(wrapper, "parameter_name", parameter) != parameter:
            wrapper = wrapper.base_layer
        return wrapper


def tensor_key(name: str, stack: Stack | None) -> str:
    """Return the name under which PEFT saves the factors of a target, without prefix and ending."""
    if stack is None:
        return name
    return ".".join([name.rpartition(".")[0], *["base_layer"] * stack.depth])


def stacks_of(model: nn.Module, names: Sequence[str]) -> dict[str, Stack]:
    """Return how the experts of every named tensor are kept, in the order PEFT wraps them."""
    owners = [name.rpartition(".")[0] for name in names]
    stacks = {}
    for index, (name, owner) in enumerate(zip(names, owners, strict=True)):
        weight = layer_of(model, name).weight
        transposed = is_transposed(model.get_submodule(owner))
        stacks[name] = Stack(weight.shape[0], transposed, owners[index + 1 :].count(owner))
    return stacks


def decompose_experts(
    name: str,
    weight: Tensor,
    stack: Stack,
    decompose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    *,
    scaling: float,
    stored_dtype: torch.dtype | None,
    subtracted: bool,
    orthonormal: bool = False,
) -> tuple[tuple[Tensor, Tensor], LayerCertificate]:
    """Decompose every expert of one tensor.

    Args:
        name: Full name of the parameter.
        weight: [E, rows, columns], float32 or narrower.
        stack: How the experts are kept.
        decompose: Returns U, S and Vh of the slice of one expert.
        scaling: lora_alpha / r.
        stored_dtype: As for ``certify_layer``.
        subtracted: As for ``certify_layer``.
        orthonormal: Leave the singular values out of the factors.

    Returns:
        lora_A and lora_B as PEFT lays them out, and the certificate of the tensor as a whole.
    """
    lefts, rights, layers, norms = [], [], [], []
    for expert in weight:
        values = expert.to(torch.float32)
        U, S, Vh = decompose(values)
        root = ((torch.ones_like(S) if orthonormal else S) / scaling).sqrt()
        lefts.append(U * root)
        rights.append(root[:, None] * Vh)
        start = (scaling * lefts[-1], rights[-1])
        settings = {"stored_dtype": stored_dtype, "subtracted": subtracted}
        layers.append(certify_layer(name, values, (U, S, Vh), start, **settings))
        norms.append(float(values.norm()))
    factors = stack.pack(torch.stack(lefts), torch.stack(rights))
    return factors, _as_one(layers, norms, (weight.shape[1], weight.shape[2]))


def _as_one(
    layers: Sequence[LayerCertificate], norms: Sequence[float], shape: tuple[int, int]
) -> LayerCertificate:
    """Return one certificate for all experts: ratios to the norm of the whole tensor."""
    whole = sum(norm**2 for norm in norms) ** 0.5 or 1.0

    def ratio(key: str) -> float:
        parts = [getattr(layer, key) or 0.0 for layer in layers]
        return sum((part * n) ** 2 for part, n in zip(parts, norms, strict=True)) ** 0.5 / whole

    ratios = (
        "reconstruction_error_ratio", "minor_norm_ratio", "rounding_loss_ratio",
        "rounding_loss_if_subtracted_ratio", "svd_residual_ratio",
    )  # fmt: skip
    return replace(
        layers[0],
        shape=shape,
        **{key: ratio(key) for key in ratios},
        minor_energy_ratio=ratio("minor_norm_ratio") ** 2,
        sigma_max=max(layer.sigma_max for layer in layers),
        sigma_min=min(layer.sigma_min for layer in layers),
        zero_directions=sum(layer.zero_directions for layer in layers),
    )
