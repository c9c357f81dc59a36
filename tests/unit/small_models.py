"""What tests of several folders share: a random text model, a few steps of training, a data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from milora_vl.data.dataset import ConversationDataset
from milora_vl.data.images import ImageTransform
from milora_vl.data.records import Conversation


def build_llama(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> LlamaForCausalLM:
    """Build a random two-layer language model for a tokenizer; seed torch before."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes | special | settings))


def train(model: Any, batch: Mapping[str, torch.Tensor], steps: int = 2, rate: float = 0.05) -> Any:
    """Take steps of plain gradient descent on one batch; return the model."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=rate)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def bind(vlm: Any, conversations: Sequence[Conversation], folder: Path) -> ConversationDataset:
    """Return conversations with images in a folder as samples for a model, in ChatML."""
    return ConversationDataset(
        conversations,
        folder,
        ImageTransform(vlm.processor.image_processor),
        "chatml",
        vlm.processor.tokenizer,
        vlm.tokens_per_image,
    )
