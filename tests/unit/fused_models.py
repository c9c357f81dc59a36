"""Tiny random models whose layers fuse projections or experts, each of another layout."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

IDS = torch.tensor([[3, 9, 14, 27, 5, 31], [8, 2, 40, 11, 6, 7]])
SLOW = {"lora_alpha": 6.0, "factor_cache": False, "train_projector": False}
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


EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def qwen3_moe() -> nn.Module:
    """Experts as [E, d_out, d_in]; PEFT knows the type by its older layout of linear layers."""
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **EXPERTS))


def aria() -> nn.Module:
    """Experts as [E, d_in, d_out], which their module says; shared experts in linear layers."""
    config = tf.AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    return tf.AriaTextForCausalLM(config)


def llama4() -> nn.Module:
    """Experts as [E, d_in, d_out] without a word of it; a shared expert in linear layers."""
    sizes = {"intermediate_size_mlp": 40, "num_local_experts": 4, "interleave_moe_layer_step": 1}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**TEXT | {"intermediate_size": 12}, **sizes))


def qwen3_5_moe() -> nn.Module:
    """Experts beside fused linear attention."""
    sizes = {**EXPERTS, "shared_expert_intermediate_size": 16}
    config = tf.Qwen3_5MoeTextConfig(**TEXT, **LINEAR_ATTENTION, **sizes)
    return tf.Qwen3_5MoeForCausalLM(config)


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": qwen3_moe,
    "aria": aria,
    "llama4": llama4,
    "qwen3_5_moe": qwen3_5_moe,
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


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def train(model: nn.Module, steps: int = 2) -> None:
    """Take steps large enough to change the outputs visibly."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    for _ in range(steps):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
