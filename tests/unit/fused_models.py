"""Tiny random models whose layers fuse projections or experts, each of another layout."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

TEXT: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1,
    "pad_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def phi3() -> nn.Module:
    """qkv_proj with fewer heads of k and v, gate_up_proj."""
    return tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT))


def persimmon() -> nn.Module:
    """query_key_value, head by head (the language model of Fuyu)."""
    return tf.PersimmonForCausalLM(tf.PersimmonConfig(**TEXT | {"num_key_value_heads": 4}))


def glm4() -> nn.Module:
    """gate_up_proj beside separate attention projections (as in GLM-4.xV)."""
    return tf.Glm4ForCausalLM(tf.Glm4Config(**TEXT))


def qwen3_5() -> nn.Module:
    """in_proj_qkv of linear attention, with fewer heads of q and k than of v."""
    return tf.Qwen3_5ForCausalLM(tf.Qwen3_5TextConfig(**TEXT, **LINEAR_ATTENTION))


def qwen3_next() -> nn.Module:
    """in_proj_qkvz of linear attention, head by head; no experts."""
    config = tf.Qwen3NextConfig(**TEXT, **LINEAR_ATTENTION, mlp_only_layers=[0, 1])
    return tf.Qwen3NextForCausalLM(config)


FUSED: dict[str, Callable[[], nn.Module]] = {
    "phi3": phi3,
    "persimmon": persimmon,
    "glm4": glm4,
    "qwen3_5": qwen3_5,
    "qwen3_next": qwen3_next,
}


def build(name: str, models: dict[str, Callable[[], nn.Module]] = FUSED) -> nn.Module:
    """Return a model in eval mode with weights large enough to tell rows apart."""
    torch.manual_seed(0)
    model = models[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model
