"""Laws of packed layers: the same products, only while asked for, and never twice the memory."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from milora_vl.eval import packed_linear
from milora_vl.eval.packed_linear import MIN_ROWS, PackedLinear, packed_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, MIN_ROWS, 96), (1, 2, 96), (MIN_ROWS, 96)])
def test_products_are_the_same(bias, shape):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        assert_close(PackedLinear(layer)(x), layer(x), atol=1e-5, rtol=0)
        turned = torch.randn(96, MIN_ROWS).T  # not contiguous
        assert_close(PackedLinear(layer)(turned), layer(turned), atol=1e-5, rtol=0)


def test_layers_are_packed_in_the_block_only_also_below_an_adapter(tiny_vlm):
    from milora_vl.adapter.attach import attach_milora
    from milora_vl.config import MiloraConfig

    model, _ = attach_milora(tiny_vlm, MiloraConfig(r=4), progress=False)
    before = dict(model.named_modules())
    names = []

    def fail_inside():
        with packed_linears(model):
            names.extend(name for name, one in model.named_modules() if type(one) is PackedLinear)
            raise KeyError

    with pytest.raises(KeyError):  # whatever happens, they come back
        fail_inside()
    assert any(name.endswith("q_proj.base_layer") for name in names)
    assert dict(model.named_modules()) == before


def test_other_dtypes_and_small_memory_are_left_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.bfloat16))
    with packed_linears(model):
        assert [type(one) for one in model] == [PackedLinear, nn.Linear]
    monkeypatch.setattr(packed_linear, "MEMORY_SHARE", 0.0)
    with packed_linears(model):
        assert [type(one) for one in model] == [nn.Linear, nn.Linear]
