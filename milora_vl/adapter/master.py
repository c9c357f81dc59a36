"""Float32 master weights under a low-precision module that trains in full.

A bfloat16 weight keeps 8 bits: an optimiser step of a thousandth of its size is rounded away. The
module computes with its weights rounded to its own dtype, as before, while the optimiser moves the
float32 values behind them.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Rounded(nn.Module):
    """Parametrisation of a float32 master weight that is used in a lower precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Use the weight in ``dtype``."""
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        """Return the weight to compute with."""
        return master.to(self.dtype)


def keep_master_weights_(module: nn.Module) -> None:
    """Give every low-precision parameter of ``module`` a float32 master; its output stays."""
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dtype in LOW_PRECISION:
                master = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                setattr(owner, name, master)
                # unsafe: the dtype differs between master and weight, which is the point
                rounded = Rounded(parameter.dtype)
                parametrize.register_parametrization(owner, name, rounded, unsafe=True)


def remove_master_weights_(module: nn.Module) -> None:
    """Undo ``keep_master_weights_``: the rounded weights become plain parameters again."""
    for owner in list(module.modules()):
        if parametrize.is_parametrized(owner):
            for name in list(owner.parametrizations):
                weight = getattr(owner, name).detach()
                parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
                setattr(owner, name, nn.Parameter(weight, getattr(owner, name).requires_grad))


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of ``module`` under its plain names, master weights in float32."""
    return {plain_name(name): value for name, value in module.state_dict().items()}


def load_trained_state_(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill ``module`` from what ``trained_state`` returned.

    Raises:
        RuntimeError: If names or shapes do not fit.
    """
    module.load_state_dict({name: state[plain_name(name)] for name in module.state_dict()})


def plain_name(name: str) -> str:
    """Return the name a parameter has without its parametrisation."""
    return name.replace("parametrizations.", "").removesuffix(".original")
