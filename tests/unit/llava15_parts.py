"""What a user of the 7B recipe downloads, tiny: Vicuna, CLIP, LLaVA's stage 1 and its data."""

import json
from pathlib import Path

import torch
from chat_tokenizers import build_llama_like
from eval_data import write_mmbench
from eval_models import picture_bytes
from official_layouts import pope, sqa, textvqa
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

D, VISION_D, SIDE, PATCH = 64, 32, 28, 14  # the 4-bit kernels of CPUs need multiples of 32


def write_stage1(folder: Path) -> tuple[Path, Path]:
    """Write the original layout in float16, as published; return projector's and base's folder."""
    torch.manual_seed(0)
    tokenizer = build_llama_like("llama_legacy")
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=D, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.1, tie_word_embeddings=False,
            eos_token_id=2, bos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=VISION_D, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            image_size=SIDE, patch_size=PATCH, initializer_range=0.1,
        )
    )  # fmt: skip
    projector = nn.Sequential(nn.Linear(VISION_D, D), nn.GELU(), nn.Linear(D, D))
    base, source = folder / "vicuna", folder / "llava-stage1"
    language.half().save_pretrained(base)
    tokenizer.save_pretrained(base)
    tower.half().save_pretrained(folder / "clip")
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    pictures.save_pretrained(folder / "clip")
    source.mkdir()
    settings = {
        "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "image_aspect_ratio": "pad", "mm_hidden_size": VISION_D,
        "mm_vision_tower": str(folder / "clip"),
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(settings))
    weights = {f"model.mm_projector.{k}": v.half() for k, v in projector.state_dict().items()}
    torch.save(weights, source / "mm_projector.bin")
    return source, base


def write_playground(folder: Path, pictures: int = 12, texts: int = 4) -> Path:
    """Write a mixture like mix665k with pictures and texts, and benches below ``eval/``."""
    records = []
    for index in range(pictures):
        name = f"coco/train2017/{index:012d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture_bytes(index))
        turns = [("human", "<image>\nWhat is in the picture?"), ("gpt", f"There are {index} cats.")]
        records.append({"id": str(index), "image": name, "conversations": turns})
    for index in range(texts):
        turns = [("human", "How many cats are there?"), ("gpt", "Two cats; three dogs.")]
        records.append({"id": f"text{index}", "conversations": turns * 2})
    for record in records:
        turns = [{"from": who, "value": text} for who, text in record["conversations"]]
        record["conversations"] = turns
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    for write in (pope, sqa, textvqa):
        write(folder / "eval")
    (folder / "eval/mmbench").mkdir()
    write_mmbench(folder / "eval/mmbench/mmbench_dev_20230712.tsv")
    return folder
