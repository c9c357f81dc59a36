"""Small real tokenizers, trained here: a byte-level one like SmolLM2's and three like Llama's."""

import json
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from milora_vl.constants import IMAGE_TOKEN

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: There is a red fox, and 12 apples.",
    "How many cats are there? Answer with one word. Yes. No. Two cats; three dogs: four.",
    "[INST] What colour is the ball on the left? [/INST] The ball is blue.\nIt is round.",
    "system\nuser\nassistant\nanswer answers another 1 2 3 10 21\n\nIt is :) or :( today",
] * 4
LLAMA_LIKE = ("llama", "llama_legacy", "llama_prepend")
ALL = ("byte_level", *LLAMA_LIKE)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@lru_cache
def build_byte_level(trained: bool = True) -> PreTrainedTokenizerBase:
    """SmolLM2's pipeline; pad, as there, is the end token. Untrained: one token a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *CHATML_TOKENS, "<s>", "</s>", IMAGE_TOKEN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = 400 if trained else len(special) + len(alphabet)
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


FAMILY_TOKENS = (
    "<pad>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *[f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)],
    "<image_soft_token>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", *[f"TILE_{tile}" for tile in range(1, 7)],
    "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>",
)  # fmt: skip


def build_extended(**named: str) -> PreTrainedTokenizerBase:
    """The byte-level tokenizer with every family's special tokens; ``named`` sets attributes."""
    inner = Tokenizer.from_str(build_byte_level().backend_tokenizer.to_str())
    inner.add_special_tokens([AddedToken(token, special=True) for token in FAMILY_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<|endoftext|>",
        extra_special_tokens=named or None,
    )


@lru_cache
def build_llama_like(kind: str) -> PreTrainedTokenizerBase:
    """Llama's pipeline with byte fallback; the three kinds differ in where the space mark goes.

    llama: only at the very start; llama_legacy: after every special token too; llama_prepend: the
    same through a normaliser, even before a space.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=260))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + sorted(
        trained.get_vocab(), key=trained.get_vocab().__getitem__
    ):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in _merges(trained)]
    if kind == "llama_prepend":
        tokenizer = Tokenizer(
            models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
        result = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    else:
        result = LlamaTokenizer(vocab=vocab, merges=merges, legacy=kind == "llama_legacy")
    extra = [AddedToken(name, special=True) for name in (*CHATML_TOKENS, IMAGE_TOKEN)]
    result.add_special_tokens({"additional_special_tokens": extra})
    return result


def build(kind: str) -> PreTrainedTokenizerBase:
    return build_byte_level() if kind == "byte_level" else build_llama_like(kind)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]
