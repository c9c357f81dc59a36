"""Which linear layers of a language model are attention and MLP projections, told by their names.

Names are what the authors of a model call its parts, so only known ones are taken. A gate, an index
of sparse attention or a router is left out and told; a layer that holds several projections or
experts at once, and a model without known attention or MLP projections, is refused.
"""

import re

from torch import nn

_ATTENTION_NAME = re.compile(
    r"[qkvo]_proj|out_proj|[qk]_[ab]_proj|kv_b_proj|kv_a_proj_with_mqa|query|key|value|[qkvo]|"
    r"w[qkvo]|attn_out"
)
_MLP_NAME = re.compile(
    r"(gate|up|down)_proj|fc[12]|fc_(in|out)|w[123]|c_fc(_[01])?|wi(_[01])?|dense_h_to_4h|"
    r"dense_4h_to_h|linear_[12v]|lin[12]"
)
_EITHER_NAME = re.compile(r"dense|c_proj|proj|linear|output|wo")  # told by the block around it
_FUSED_NAME = re.compile(
    r"\w*qkv\w*|query_key_value|c_attn|kv_proj|(gate_up|up_gate|gate_and_up)_proj|in_proj_ba",
    re.IGNORECASE,
)
_ROUTER_NAME = re.compile(r"gate|router|shared_expert_gate")
_ATTENTION_BLOCK = re.compile(r"attn|attention", re.IGNORECASE)
_OTHER_BLOCK = re.compile(r"gate$|indexer|conv|mamba|ssm", re.IGNORECASE)
_MLP_BLOCK = re.compile(
    r"mlp|feed_?forward|ffn|\bff\b|expert|moe|intermediate|dense\w*dense|^output$", re.IGNORECASE
)


def kind_of(name: str) -> str | None:
    """Tell what a linear layer of a decoder is: "attention", "mlp", "fused", "router" or None.

    Args:
        name: Its full name. Layers outside a numbered decoder layer are None.
    """
    *blocks, last = name.split(".")
    numbers = [place for place, block in enumerate(blocks) if block.isdigit()]
    if _FUSED_NAME.fullmatch(last):
        return "fused"
    if _ROUTER_NAME.fullmatch(last):
        return "router"
    around = blocks[numbers[0] + 1 :] if numbers else []
    if not numbers or any(_OTHER_BLOCK.search(block) for block in around):
        return None
    in_attention = any(_ATTENTION_BLOCK.search(block) for block in around)
    in_mlp = not in_attention and any(_MLP_BLOCK.search(block) for block in around)
    if _EITHER_NAME.fullmatch(last):
        return "attention" if in_attention else "mlp" if in_mlp else None
    if _MLP_NAME.fullmatch(last):
        return "mlp"
    is_bare = not around or (around == ["mixer"] and last != "out_proj")
    return "attention" if _ATTENTION_NAME.fullmatch(last) and (in_attention or is_bare) else None


def holds_experts(name: str, module: nn.Module) -> bool:
    """Tell whether a module of a decoder layer keeps several experts in one tensor of its own."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not re.search(r"\.\d+\.", name):
        return False
    return any(p.dim() == 3 and len(p) > 1 for p in module.parameters(recurse=False))
